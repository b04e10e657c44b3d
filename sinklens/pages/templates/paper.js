"use strict";
// What stands on paper in place of the interactive views: tokens on their colours, and all heads beside one another.
(() => {
  const BLUE = "31, 106, 165", RED = "192, 57, 43", UNSEEN = "#dddddd";
  const colour = (value, most) => `rgba(${value < 0 ? RED : BLUE}, ${Math.min(1, Math.abs(value) / most)})`;
  const add = (parent, tag, className, text = "") => {
    const element = parent.appendChild(document.createElement(tag));
    element.className = className;
    element.textContent = text;
    return element;
  };

  const tokens = (place, { tokens, values, minValue, maxValue }) => {
    const most = Math.max(Math.abs(minValue), Math.abs(maxValue)) || 1;
    tokens.forEach((token, index) => {
      const box = add(place, "span", "token", token);
      box.style.background = colour(values[index], most);
      if (Math.abs(values[index]) > 0.55 * most) box.style.color = "#ffffff";
    });
  };

  const heads = (place, { attention, attentionHeadNames, maxValue }) => {
    attention.forEach((pattern, head) => {
      const box = add(place, "div", "head", attentionHeadNames[head]);
      const canvas = add(box, "canvas", "");
      const cell = Math.ceil(320 / pattern.length); // a point for every number would be blurred by the printer
      canvas.width = canvas.height = cell * pattern.length;
      const context = canvas.getContext("2d");
      pattern.forEach((row, query) => row.forEach((value, key) => {
        context.fillStyle = key > query ? UNSEEN : colour(value, maxValue || 1);
        context.fillRect(key * cell, query * cell, cell, cell);
      }));
    });
  };

  const kinds = { ColoredTokens: ["tokens", tokens], AttentionHeads: ["heads", heads] };
  for (const place of document.querySelectorAll("[data-paper]"))
    for (const section of JSON.parse(document.getElementById(place.dataset.paper).textContent)) {
      if (section.title) add(place, "p", "of-views", section.title);
      for (const view of section.views) {
        const [className, draw] = kinds[view.component];
        add(place, "p", "of-view", view.title);
        draw(add(place, "div", className), view.props);
      }
    }
})();
