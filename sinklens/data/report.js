"use strict";
(() => {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const narrow = matchMedia("(max-width: 44rem)");
  // Colours of the figures that would not show on a dark ground.
  const inDark = { "#444444": "#c9d1d9", "#f5f5f5": "#2a3038", "#053061": "#4a96d2", "#2b78b5": "#1f5f99", "#2f7fbc": "#4a9bd9", "#d9661f": "#ee8a4a" };

  const recoloured = (value) => {
    if (Array.isArray(value)) return value.map(recoloured);
    if (value && typeof value === "object")
      return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, recoloured(item)]));
    return typeof value === "string" && value in inDark ? inDark[value] : value;
  };

  const template = () => {
    const css = getComputedStyle(document.documentElement);
    const colour = (name) => css.getPropertyValue(name).trim();
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

  const draw = (place) => {
    const name = narrow.matches && place.dataset.narrow ? place.dataset.narrow : place.dataset.figure;
    let figure = JSON.parse(document.getElementById("figure-" + name).textContent);
    if (dark.matches) figure = recoloured(figure);
    for (const trace of figure.data.filter((item) => item.type === "heatmap")) {
      if (narrow.matches) trace.showscale = false;
      if (dark.matches) trace.textfont = { color: "#ffffff" };
    }
    const layout = { ...figure.layout, template: template(), dragmode: false, autosize: true };
    const config = { responsive: true, displaylogo: false, scrollZoom: false, modeBarButtons: [["toImage"]] };
    return Plotly.react(place, figure.data, layout, config);
  };

  const drawAll = () => document.querySelectorAll("[data-figure]").forEach(draw);
  drawAll();
  dark.addEventListener("change", drawAll);
  narrow.addEventListener("change", drawAll);

  addEventListener("message", (event) => {
    for (const frame of document.querySelectorAll("iframe"))
      if (event.source === frame.contentWindow && Number.isFinite(event.data?.height))
        frame.style.height = Math.min(20000, Math.ceil(event.data.height) + 2) + "px";
  });
})();
