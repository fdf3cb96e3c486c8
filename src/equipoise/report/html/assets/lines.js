// Draws the curves with Plotly from their specifications: fills in colours, follows menus and chips.
const FREE_TEXT = new Set(["x", "y", "ticktext", "name", "text"]); // words and numbers of the records, never a colour

function paint(value) {
  if (typeof value === "string") return /^@[a-z0-9-]+(\/[\d.]+)?$/.test(value) ? color(value) : value;
  if (Array.isArray(value)) return typeof value[0] === "number" ? value : value.map(paint);
  if (value && typeof value === "object")
    return Object.fromEntries(Object.entries(value).map(([key, one]) => [key, FREE_TEXT.has(key) ? one : paint(one)]));
  return value;
}

function trace(spec) {
  const made = paint(spec);
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

const viewOf = (div) => {
  const views = report.figures[div.id].views;
  return views[Math.min(chosen[div.dataset.menu] || 0, views.length - 1)];
};

const shown = (view) => view.data.filter((one) => one.s == null || !hidden.has(one.s));

function layoutOf(view) {
  return {
    ...paint(view.layout),
    xaxis: { showgrid: false, ...axis(view.layout.xaxis) },
    yaxis: axis(view.layout.yaxis),
    margin: { l: 44, r: 10, t: 8, b: 40 },
    font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: color("@soft") },
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    dragmode: coarse ? false : "zoom",
    hoverlabel: { bgcolor: color("@raised"), bordercolor: color("@line"), font: { color: color("@ink"), size: 12 }, namelength: 24 },
    legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", bgcolor: "rgba(0,0,0,0)", ...view.layout.legend },
  };
}

function drawLines(div) {
  if (!window.Plotly) return;
  const figure = report.figures[div.id], view = viewOf(div), under = div.nextElementSibling;
  const phone = innerWidth <= 760, legend = figure.rows ? 17 * view.data.length : 0; // a line for each name there
  const height = phone ? (figure.rows ? figure.height + legend : Math.min(figure.height, 290)) : figure.height;
  Plotly.react(div, shown(view).map(trace), { ...layoutOf(view), height }, { displayModeBar: false, responsive: true, scrollZoom: false });
  under.textContent = view.note || "";
  under.hidden = !view.note;
}

// One row a point: strategy (or the curve's own name), x, y, and the ends of the band where there is one.
function linesAsRows(div) {
  const view = viewOf(div), bands = new Map();
  for (const one of view.data) // there and back again
    if (one.fill === "toself") bands.set(one.legendgroup, (at) => [one.y[one.y.length - 1 - at], one.y[at]]);
  const lying = view.data.some((one) => one.orientation === "h"); // bars, whose names stand where other figures have numbers
  const rows = [["series", lying ? "bar" : view.layout.xaxis.title.text, view.label, ...(bands.size ? ["low", "high"] : [])]];
  for (const one of view.data) {
    const name = one.s == null ? one.name : report.strategies[one.s], band = bands.get(one.legendgroup) || (() => []);
    const [x, y] = lying ? [one.y, one.x] : [one.x, one.y];
    if (one.hovertemplate) x.forEach((value, at) => rows.push([name, value, y[at], ...band(at)]));
  }
  return rows.map((row) => row.map((cell) => (typeof cell === "string" ? plain(cell) : cell)));
}

// Names in a chart are escaped, for Plotly reads a little HTML; what is copied is the name itself.
const plain = (text) => text.replace(/&(lt|gt|amp);/g, (_, name) => ({ lt: "<", gt: ">", amp: "&" })[name]);

const plots = [...document.querySelectorAll(".plot")];
for (const div of plots) {
  follow(div.dataset.menu, () => drawLines(div));
  redraws.push(() => drawLines(div));
}
let resizing = 0;
addEventListener("resize", () => { // Plotly leaves its legend where it was
  clearTimeout(resizing);
  resizing = setTimeout(() => plots.forEach(drawLines), 200);
});

// Last of all: to read Plotly takes a browser longer than everything else together.
async function loadPlotly() {
  if (!plots.length) return;
  const script = document.createElement("script");
  script.textContent = await unpacked("report-plotly");
  await new Promise((painted) => setTimeout(painted, 0));
  document.head.append(script);
  plots.forEach(drawLines);
}
