// Draws the report's charts from the JSON beside it: fills in the colours of the scheme, follows menus and chips.
(() => {
  "use strict";
  const report = JSON.parse(document.getElementById("report-data").textContent);
  const hidden = new Set(); // strategies switched off
  const chosen = {}; // menu -> index of the view
  const coarse = matchMedia("(pointer: coarse)").matches;
  const style = () => getComputedStyle(document.documentElement);

  const cycled = (strategy) => (strategy < 8 ? strategy : 1 + ((strategy - 1) % 7)); // the baseline's grey stays its own

  function color(token) {
    const [name, alpha] = token.slice(1).split("/");
    const strategy = /^s(\d+)$/.exec(name);
    const hex = style().getPropertyValue("--" + (strategy ? "s" + cycled(Number(strategy[1])) : name)).trim();
    if (!alpha) return hex;
    const [r, g, b] = [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
    return `rgba(${r},${g},${b},${alpha})`;
  }

  function shareScale(top) {
    const stops = [[0, "share-low"], [1 / top, "share-even"], [(1 + (top - 1) * 0.45) / top, "share-high"], [1, "share-top"]];
    return stops.map(([at, name]) => [at, color("@" + name)]);
  }

  function paint(value) {
    if (typeof value === "string") return /^@[a-z0-9-]+(\/[\d.]+)?$/.test(value) ? color(value) : value;
    if (Array.isArray(value)) return typeof value[0] === "number" ? value : value.map(paint);
    if (value && typeof value === "object")
      return Object.fromEntries(Object.entries(value).map(([key, one]) => [key, FREE_TEXT.has(key) ? one : paint(one)]));
    return value;
  }
  const FREE_TEXT = new Set(["rows", "columns", "z", "x", "y", "ticktext", "name", "text"]);

  function trace(spec) {
    const made = paint(spec);
    if (spec.type === "heatmap") {
      made.colorscale = shareScale(spec.zmax);
      made.customdata = spec.rows.map((row) => spec.columns.map((column) => [row, column]));
      delete made.rows;
      delete made.columns;
    }
    if (spec.s != null) {
      made.name = report.strategies[spec.s];
      if (made.line && spec.s >= 8) made.line.dash = ["dash", "dot", "dashdot"][(Math.floor(spec.s / 8) - 1) % 3];
    }
    delete made.s;
    return made;
  }

  function axis(own) {
    const base = {
      gridcolor: color("@grid"), linecolor: color("@line"), zeroline: false, tickfont: { size: 12 }, fixedrange: coarse,
      automargin: true, ticks: "outside", tickcolor: "rgba(0,0,0,0)", ticklen: 4,
    };
    const made = { ...base, ...paint(own || {}) };
    if (made.title) made.title = { standoff: 8, font: { size: 12, color: color("@muted") }, ...made.title };
    return made;
  }

  function draw(div) {
    const figure = report.figures[div.id];
    const view = figure.views[Math.min(chosen[div.dataset.menu] || 0, figure.views.length - 1)];
    const layout = paint(view.layout);
    const phone = div.clientWidth < 480;
    Plotly.react(div, view.data.filter((one) => one.s == null || !hidden.has(one.s)).map(trace), {
      ...layout,
      xaxis: { showgrid: false, ...axis(view.layout.xaxis) },
      yaxis: axis(view.layout.yaxis),
      height: phone ? Math.min(figure.height, 290) : figure.height,
      margin: { l: 44, r: 10, t: 8, b: 40 },
      font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: color("@soft") },
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      dragmode: coarse ? false : "zoom",
      hoverlabel: { bgcolor: color("@raised"), bordercolor: color("@line"), font: { color: color("@ink"), size: 12 }, namelength: 24 },
      legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", bgcolor: "rgba(0,0,0,0)" },
    }, { displayModeBar: false, responsive: true, scrollZoom: false });
  }

  const plots = [...document.querySelectorAll(".plot")];
  const drawAll = () => plots.forEach(draw);

  for (const menu of document.querySelectorAll("select[data-menu]")) {
    chosen[menu.dataset.menu] = menu.selectedIndex; // a browser may bring back the choice of an earlier visit
    menu.addEventListener("change", () => {
      chosen[menu.dataset.menu] = menu.selectedIndex;
      plots.filter((div) => div.dataset.menu === menu.dataset.menu).forEach(draw);
    });
  }
  for (const chip of document.querySelectorAll(".chip")) {
    chip.addEventListener("click", () => {
      const strategy = Number(chip.dataset.strategy);
      if (!hidden.delete(strategy)) hidden.add(strategy);
      for (const same of document.querySelectorAll(`.chip[data-strategy="${strategy}"]`))
        same.setAttribute("aria-pressed", String(!hidden.has(strategy)));
      plots.filter((div) => div.dataset.lines).forEach(draw);
    });
  }
  for (const ramp of document.querySelectorAll(".ramp")) {
    const top = Number(ramp.dataset.top);
    const stops = () => shareScale(top).map(([at, hex]) => `${hex} ${100 * at}%`).join(",");
    const fill = () => { ramp.style.background = `linear-gradient(to right,${stops()})`; };
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", fill);
    fill();
  }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
  drawAll();
  document.documentElement.dataset.drawn = "yes";
})();
