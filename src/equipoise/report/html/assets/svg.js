// A figure as an SVG file that stands alone: its title, its legend, and every colour and font as they are now.
const SVG = document.createRange().createContextualFragment("<svg></svg>").firstChild.namespaceURI; // the page holds no address
const FILE_WIDE = 760, ROOM = 20; // pixels

function shape(tag, attributes = {}, ...children) {
  const made = document.createElementNS(SVG, tag);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

const near = (value) => Number(value.toFixed(1));
const ANCHOR = { left: "start", center: "middle", right: "end" };
const textAt = (text, x, y, fill, align = "left", more = {}) => // dy: few programs know dominant-baseline
  shape("text", { x: near(x), y: near(y), dy: ".35em", fill, "text-anchor": ANCHOR[align], ...more }, text);

// Does with shapes what CanvasPen does on a canvas; boxes of one colour are one path, which keeps files small.
class Shapes {
  constructor() {
    this.boxes = new Map();
    this.words = [];
  }

  box(x, y, wide, high, fill) {
    const path = `M${near(x)} ${near(y)}h${near(wide)}v${near(high)}h${near(-wide)}z`;
    this.boxes.set(fill, (this.boxes.get(fill) || "") + path);
  }

  text(text, x, y, fill, align) { this.words.push(textAt(text, x, y, fill, align)); }

  nodes() { return [...[...this.boxes].map(([fill, d]) => shape("path", { fill, d })), ...this.words]; }
}

// Lines of text that are as wide as the file at most.
function wrapped(text, font) {
  const lines = [];
  for (const word of text.split(/\s+/)) {
    const longer = lines.length ? `${lines.at(-1)} ${word}` : word;
    if (lines.length && widthOf(longer, font) <= FILE_WIDE - 2 * ROOM) lines[lines.length - 1] = longer;
    else lines.push(word);
  }
  return lines;
}

// What stands above a figure, in rows: names with the colour and dash of their lines.
function legendOf(entries, top) {
  const nodes = [];
  let x = ROOM, y = top;
  for (const { name, fill, dash } of entries) {
    const wide = 24 + widthOf(name);
    if (x > ROOM && x + wide > FILE_WIDE - ROOM) [x, y] = [ROOM, y + 20];
    nodes.push(shape("path", { d: `M${near(x)} ${y}h16`, stroke: fill, "stroke-width": 3, ...(dash ? { "stroke-dasharray": dash } : {}) }),
      textAt(name, x + 22, y, color("@soft")));
    x += wide + 18;
  }
  return [nodes, entries.length ? y + 20 : top];
}

function scaleOf(map, top) {
  const id = `${map.div.id}-scale`, ratio = map.spec.scale === "ratio", wide = 190, left = ROOM + 14;
  const marks = stops(map.spec.scale, map.top).map(([at, hex]) => shape("stop", { offset: `${near(100 * at)}%`, "stop-color": hex }));
  const muted = color("@muted"), nodes = [
    shape("defs", {}, shape("linearGradient", { id }, ...marks)), textAt("0", ROOM, top, muted),
    shape("rect", { x: left, y: top - 5, width: wide, height: 10, fill: `url(#${id})`, stroke: color("@line") }),
    textAt(ratio ? `${short(map.top)}×` : short(map.top), left + wide + 8, top, muted),
  ];
  if (ratio) nodes.push(textAt("1 = even", left + wide / map.top, top + 15, muted, "center"));
  return [nodes, top + (ratio ? 36 : 22)];
}

// The file: `head` and `body` are called with their upper edge and give nodes with their lower one.
function framed(div, view, head, body, note = "") {
  const title = div.dataset.title, nodes = [];
  let y = 26;
  for (const line of wrapped(title, fontOf(15, "600"))) {
    nodes.push(textAt(line, ROOM, y, color("@ink"), "left", { "font-size": 15, "font-weight": 600 }));
    y += 21;
  }
  if (view.label && view.label !== title) {
    nodes.push(textAt(view.label, ROOM, y, color("@soft")));
    y += 22;
  }
  for (const part of [head, body]) {
    const [more, bottom] = part(y);
    nodes.push(...more);
    y = bottom;
  }
  for (const line of note ? wrapped(note, fontOf(12)) : []) {
    nodes.push(textAt(line, ROOM, y + 6, color("@muted")));
    y += 18;
  }
  const tall = Math.ceil(y + 14);
  const file = shape("svg", { width: FILE_WIDE, height: tall, viewBox: `0 0 ${FILE_WIDE} ${tall}`, role: "img", "font-size": 12,
                              "font-family": getComputedStyle(document.body).fontFamily }, // prettier-ignore
    shape("title", {}, view.label === title ? title : `${title}: ${view.label}`), shape("rect", { width: "100%", height: "100%", fill: color("@paper") }), ...nodes);
  return `<?xml version="1.0" encoding="UTF-8"?>\n${new XMLSerializer().serializeToString(file)}\n`;
}

async function linesAsSvg(div) {
  const view = viewOf(div), figure = report.figures[div.id], lines = shown(view), data = lines.map(trace);
  const dashes = { dash: "8 5", dot: "2 4", dashdot: "8 4 2 4" };
  const entries = report.strategies.length < 2 ? [] : lines.flatMap(({ s, hovertemplate }, at) => {
    if (s == null || !hovertemplate) return [];
    const { name, line } = data[at], count = report.counts[s];
    return [{ name: plain(name) + (count ? `, ${count}` : ""), fill: line.color, dash: dashes[line.dash] }];
  });
  const wide = FILE_WIDE - 2 * ROOM, height = figure.height;
  const layout = { ...layoutOf(view), width: wide, height, autosize: false };
  const text = await Plotly.toImage({ data, layout }, { format: "svg", width: wide, height, imageDataOnly: true });
  const drawn = document.importNode(new DOMParser().parseFromString(text, "image/svg+xml").documentElement, true);
  return framed(div, view, (top) => legendOf(entries, top), (top) => {
    drawn.setAttribute("x", ROOM);
    drawn.setAttribute("y", top);
    return [[drawn], top + height];
  }, view.note);
}

async function mapAsSvg(map) {
  const layout = map.layout(FILE_WIDE - 2 * ROOM), pen = new Shapes();
  map.paint(pen, layout);
  return framed(map.div, map.view, (top) => scaleOf(map, top), (top) => [
    [shape("g", { transform: `translate(${ROOM} ${top})` }, ...pen.nodes())], top + layout.tall]);
}

function fileName(div) {
  const view = div.classList.contains("plot") ? viewOf(div) : maps.find((map) => map.div === div).view;
  return `${`${div.dataset.title} ${view.label}`.toLowerCase().replace(/[^a-z0-9]+/g, "-").replace(/^-+|-+$/g, "").slice(0, 80) || "figure"}.svg`;
}

async function save(div, made) {
  const address = URL.createObjectURL(new Blob([await made], { type: "image/svg+xml" })), name = fileName(div);
  make("a", { href: address, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(address), 60_000);
  notice(`Saved ${name}`);
}

// Every figure as the page shows it, for `equipoise report --svg`: [[file name, text], ...].
root.figuresAsSvg = async () => {
  const made = [];
  for (const div of document.querySelectorAll(".plot, .map"))
    made.push([fileName(div), await (div.classList.contains("plot") ? linesAsSvg(div) : mapAsSvg(maps.find((map) => map.div === div)))]);
  return made;
};
