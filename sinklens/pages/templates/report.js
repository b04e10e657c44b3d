"use strict";
(() => {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const narrow = matchMedia("(max-width: 44rem)");
  let printing = false;

  // Colours of the figures that would not show on a dark ground: marks, and the stops of the colour scales in use.
  const inDark = {
    "#444444": "#c9d1d9", "#f5f5f5": "#2a3038", "#053061": "#4a96d2", "#2b78b5": "#1f5f99", "#8c510a": "#a8690f",
    "#2f7fbc": "#4a9bd9", "#d9661f": "#ee8a4a", "#8a8a8a": "#a3a3a3", "#7a5aa6": "#a98ad6", "#3f8f4f": "#62b573", "#b8447a": "#dd74a2",
  };
  const scales = [
    [ // Blues
      "rgb(247,251,255)", "rgb(222,235,247)", "rgb(198,219,239)", "rgb(158,202,225)", "rgb(107,174,214)",
      "rgb(66,146,198)", "rgb(33,113,181)", "rgb(8,81,156)", "rgb(8,48,107)",
    ],
    [ "#1b222b", "#1c2d3e", "#1d3852", "#1f4568", "#23557f", "#2b6799", "#377cb4", "#4993cf", "#67aee6" ],
    [ // RdBu
      "rgb(103,0,31)", "rgb(178,24,43)", "rgb(214,96,77)", "rgb(244,165,130)", "rgb(253,219,199)", "rgb(247,247,247)",
      "rgb(209,229,240)", "rgb(146,197,222)", "rgb(67,147,195)", "rgb(33,102,172)", "rgb(5,48,97)",
    ],
    [
      "#f08a78", "#d96a55", "#b34f40", "#803c33", "#4d2f2c", "#2a3038",
      "#26394a", "#264d6b", "#2b6791", "#3a82b8", "#57a2da",
    ],
  ];
  for (let i = 0; i < scales.length; i += 2) scales[i].forEach((colour, at) => { inDark[colour] = scales[i + 1][at]; });

  // Before printing the style sheet still answers for the screen.
  const onPaper = { "--line": "#d9dee4", "--ink": "#1b1f24", "--soft": "#59626d", "--raised": "#f6f7f9" };
  // A figure on paper is drawn larger than it stands there: its letters are as large as those of the tables.
  const paperHeight = 840, paperZoom = 0.7;
  const paperWidth = (place) => (place.closest(".pair") ? 340 : place.closest("figure:not(.whole, .broad)") ? 440 : 700) / paperZoom;

  const recoloured = (value) => {
    if (Array.isArray(value)) return value.map(recoloured);
    if (value && typeof value === "object")
      return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, recoloured(item)]));
    return typeof value === "string" && Object.hasOwn(inDark, value) ? inDark[value] : value;
  };

  const template = () => {
    const css = getComputedStyle(document.documentElement);
    const colour = (name) => (printing ? onPaper[name] : css.getPropertyValue(name).trim());
    const axis = { gridcolor: colour("--line"), linecolor: colour("--line"), zerolinecolor: colour("--line"), tickcolor: colour("--line"), zeroline: false, automargin: true };
    return {
      layout: {
        font: { color: colour("--ink"), family: css.getPropertyValue("--sans") },
        paper_bgcolor: "rgba(0,0,0,0)",
        plot_bgcolor: "rgba(0,0,0,0)",
        hoverlabel: { bgcolor: colour("--raised"), bordercolor: colour("--line"), font: { color: colour("--ink") } },
        modebar: { bgcolor: "rgba(0,0,0,0)", color: colour("--soft"), activecolor: colour("--ink") },
        xaxis: axis,
        yaxis: axis,
      },
    };
  };

  // Panels in columns, as many as asked: one where a screen is narrow, more than a screen's two on paper.
  const panelsOf = ({ data, layout }) => {
    const used = new Set(data.map((trace) => "xaxis" + (trace.xaxis || "x").slice(1)));
    const panels = [];
    for (const key of Object.keys(layout).filter((name) => /^xaxis\d*$/.test(name))) {
      const x = layout[key];
      const y = layout["yaxis" + (x.anchor || "y").slice(1)];
      if (used.has(key)) panels.push({ x, y });
      else if (y) x.visible = y.visible = false; // the empty place of an odd number of panels
    }
    const beside = panels.every(({ x, y }) => x.domain && y && y.domain && !x.overlaying && !y.overlaying)
      && panels.some(({ x }) => x.domain[1] - x.domain[0] < 0.8);
    if (panels.length < 2 || !beside) return [];
    return panels.sort((a, b) => b.y.domain[0] - a.y.domain[0] || a.x.domain[0] - b.x.domain[0]);
  };
  const rowsOf = (panels) => new Set(panels.map(({ y }) => y.domain[0])).size;
  const arranged = ({ layout }, panels, columns, most) => {
    if (!panels.length) return;
    const each = Math.max(220, Math.min(most, ((layout.height || 440) - 60) / rowsOf(panels)));
    const rows = Math.ceil(panels.length / columns);
    const titles = (side) => panels.map((panel) => panel[side].title).filter((found) => found && found.text);
    const [titlesX, titlesY] = [titles("x"), titles("y")];
    // A title that all share stands at the edge alone, where there are columns.
    const titled = (own, all, edge) => (edge || new Set(all.map(({ text }) => text)).size > 1 ? own || all[0] : undefined);
    layout.height = 60 + each * rows;
    panels.forEach(({ x, y }, index) => {
      const column = index % columns;
      const top = 1 - Math.floor(index / columns) / rows;
      const wanted = [top - (each - 75) / layout.height, top - 10 / layout.height];
      const across = [(column + 0.2 * (column > 0)) / columns, (column + 1) / columns];
      for (const note of layout.annotations || []) {
        const over = note.yref === "paper" && Math.abs(note.y - y.domain[1]) < 0.02
          && note.xref === "paper" && note.x >= x.domain[0] && note.x <= x.domain[1];
        if (!over || note.moved) continue;
        Object.assign(note, { x: (across[0] + across[1]) / 2, y: wanted[1], moved: true });
        if (columns > 1) note.font = { ...note.font, size: 10 };
      }
      const lowest = columns === 1 || index + columns >= panels.length;
      Object.assign(x, { domain: across, showticklabels: true, title: titled(x.title, titlesX, lowest) });
      Object.assign(y, { domain: wanted, showticklabels: true, title: titled(y.title, titlesY, column === 0) });
    });
  };

  // A legend of several lines would lie on the figure: below it there is room.
  const placed = (figure, width) => {
    const names = new Set(figure.data.filter((trace) => trace.showlegend !== false && trace.name).map((trace) => trace.name));
    const letters = [...names].reduce((sum, name) => sum + Math.min(60, String(name).length) + 7, 0);
    const legend = figure.layout.legend;
    const lines = Math.ceil((letters * 8) / width) + 1;
    const fits = letters * 6.5 < width - 60 || lines * 20 <= (figure.layout.margin?.t || 0);
    if (!legend || legend.orientation !== "h" || fits) return;
    figure.layout.height = (figure.layout.height || 440) + 18 * lines;
    figure.layout.margin = { ...figure.layout.margin, b: 60 + 20 * lines };
    figure.layout.legend = { ...legend, y: 0, yref: "container", yanchor: "bottom" };
  };

  const failed = (place) => {
    place.textContent = "This figure could not be drawn.";
    place.classList.add("failed");
  };

  const draw = (place) => {
    const small = narrow.matches && !printing;
    const name = small && place.dataset.narrow ? place.dataset.narrow : place.dataset.figure;
    let figure = JSON.parse(document.getElementById("figure-" + name).textContent);
    const night = dark.matches && !printing;
    if (night) figure = recoloured(figure);
    for (const trace of figure.data.filter((item) => item.type === "heatmap")) {
      if (small) trace.showscale = false;
      if (night && trace.colorscale) trace.textfont = { color: "#ffffff" };
    }
    const panels = small || printing ? panelsOf(figure) : [];
    const broad = printing && rowsOf(panels) > 1 && !place.closest(".whole");
    place.closest("figure")?.classList.toggle("broad", broad);
    if (small) arranged(figure, panels, 1, 330);
    if (broad) {
      const longest = Math.max(...(figure.layout.annotations || []).map((note) => String(note.text ?? "").length), 1);
      const room = Math.floor(paperWidth(place) / (5.8 * longest)); // for titles beside one another
      arranged(figure, panels, Math.max(2, Math.min(room, panels.length === 5 || panels.length === 6 ? 3 : 4)), 280);
      figure.layout.margin = { ...figure.layout.margin, b: 10 };
    }
    placed(figure, printing ? paperWidth(place) : place.clientWidth);
    const layout = { ...figure.layout, template: template(), dragmode: false, autosize: true };
    if (printing) {
      const tall = layout.height || 440;
      const lines = figure.data.some((trace) => trace.type === "heatmap" || trace.orientation === "h"); // of text
      const share = place.closest(".whole, .broad") ? 1 : lines ? 0.85 : tall > 500 ? 0.9 : 0.75;
      Object.assign(layout, { width: paperWidth(place), height: Math.min(share * tall, paperHeight / paperZoom) });
    }
    place.style.zoom = printing ? paperZoom : "";
    const config = { responsive: true, displaylogo: false, scrollZoom: false, modeBarButtons: [["toImage"]] };
    return Plotly.react(place, figure.data, layout, config);
  };

  const attempt = async (place) => {
    try {
      await draw(place);
      place.dataset.drawn = "yes";
    } catch (error) {
      failed(place);
    }
  };
  const places = [...document.querySelectorAll("[data-figure]")];
  const drawAll = async () => {
    for (const place of places) {
      await attempt(place);
      await new Promise((resume) => setTimeout(resume)); // reading goes on while the rest is drawn
    }
    document.documentElement.dataset.drawn = "yes";
  };
  drawAll();
  dark.addEventListener("change", drawAll);
  narrow.addEventListener("change", drawAll);

  // Paper is white, has no folds to open, and is narrower than a screen.
  let folded = [];
  addEventListener("beforeprint", () => {
    printing = true;
    folded = [...document.querySelectorAll("details:not([open])")];
    for (const fold of folded) fold.open = true;
    places.forEach(attempt);
  });
  addEventListener("afterprint", () => {
    printing = false;
    for (const fold of folded) fold.open = false;
    drawAll();
  });

  // The frames share one copy of CircuitsVis: each is made of it and of its own data.
  const text = (id) => document.getElementById(id).textContent;
  const script = (content, attributes = "") => `<script${attributes}>${content}<\/script>`;
  for (const frame of document.querySelectorAll("iframe[data-views]"))
    frame.srcdoc = `<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Views</title>`
      + `<style>${text("frame-style")}</style></head><body><main></main>`
      + script(text(frame.dataset.views), ' type="application/json" id="views"')
      + script(text("frame-library")) + script(text("frame-script")) + "</body></html>";

  addEventListener("message", (event) => {
    for (const frame of document.querySelectorAll("iframe"))
      if (event.source === frame.contentWindow && Number.isFinite(event.data?.height))
        frame.style.height = Math.min(20000, Math.ceil(event.data.height) + 2) + "px";
  });
})();
