"use strict";
// Draws the views of this page with CircuitsVis, and tells an enclosing page how high it is.
(() => {
  const main = document.querySelector("main");
  const add = (parent, tag, text) => {
    const made = parent.appendChild(document.createElement(tag));
    if (text) made.textContent = text;
    return made;
  };
  let count = 0;
  for (const section of JSON.parse(document.getElementById("views").textContent)) {
    const outer = add(main, "section");
    if (section.title) add(outer, "h2", section.title);
    const row = add(outer, "div");
    row.className = "row";
    for (const view of section.views) {
      const box = add(row, "div");
      add(box, "h3", view.title);
      const place = add(box, "div");
      place.id = `view-${count++}`;
      place.dataset.component = view.component;
      CircuitsVis.render(place.id, CircuitsVis[view.component], view.props);
    }
  }

  // The heads are plain boxes that wait for a click: let keys reach them too.
  const reachable = () => {
    for (const name of main.querySelectorAll("h4")) {
      const box = name.parentElement;
      if (box.tabIndex === 0) continue;
      box.tabIndex = 0;
      box.setAttribute("role", "button");
      box.setAttribute("aria-label", `Head ${name.textContent}`);
    }
    for (const place of main.querySelectorAll('[data-component="ColoredTokens"]')) {
      place.tabIndex = 0;
      place.setAttribute("role", "group");
      place.setAttribute("aria-label", place.previousElementSibling.textContent);
    }
  };
  new MutationObserver(reachable).observe(main, { childList: true, subtree: true });
  main.addEventListener("keydown", (event) => {
    if (event.target.getAttribute("role") !== "button" || (event.key !== "Enter" && event.key !== " ")) return;
    event.preventDefault();
    event.target.click();
  });
  new ResizeObserver(() => {
    if (innerWidth > 200) parent.postMessage({ height: main.offsetHeight }, "*"); // not while it is being squeezed
  }).observe(main);
})();
