// Draws the heat maps on a canvas each; the pointer or the arrow keys tell what a cell holds.
const tip = document.body.appendChild(make("div", { class: "tip", hidden: true }));
const LABELS = 118, TALLEST = 22; // pixels
const ruler = document.createElement("canvas").getContext("2d");
const fontOf = (size = 12, weight = "") => `${weight} ${size}px ${getComputedStyle(document.body).fontFamily}`;

function widthOf(text, font = fontOf()) {
  ruler.font = font;
  return ruler.measureText(text).width;
}

function clipped(text, wide) {
  if (widthOf(text) <= wide) return text;
  let keep = text.length;
  while (keep > 1 && ruler.measureText(text.slice(0, keep) + "…").width > wide) keep -= 1;
  return text.slice(0, keep) + "…";
}

// What a map is drawn with on the page; `Shapes` does the same for a file.
class CanvasPen {
  constructor(context) {
    this.context = context;
    Object.assign(context, { font: fontOf(), textBaseline: "middle", direction: "ltr" });
  }

  box(x, y, wide, high, fill) {
    this.context.fillStyle = fill;
    this.context.fillRect(x, y, wide, high);
  }

  text(text, x, y, fill, align) {
    Object.assign(this.context, { fillStyle: fill, textAlign: align });
    this.context.fillText(text, x, y);
  }
}

class HeatMap {
  constructor(div) {
    this.div = div;
    this.spec = report.maps[div.id];
    this.canvas = div.appendChild(make("canvas", { "aria-hidden": "true" }));
    this.at = null; // the cell of the keyboard
    follow(div.dataset.menu, () => { this.draw(); if (document.activeElement === div && this.at) this.tell(this.at); });
    redraws.push(() => this.draw());
    this.canvas.addEventListener("pointermove", (event) => this.point(event));
    this.canvas.addEventListener("pointerleave", () => { tip.hidden = true; });
    div.addEventListener("keydown", (event) => this.key(event));
    div.addEventListener("blur", () => { this.at = null; tip.hidden = true; this.draw(); });
    new ResizeObserver(() => this.draw()).observe(div);
  }

  get view() {
    return this.spec.views[Math.min(chosen[this.div.dataset.menu] || 0, this.spec.views.length - 1)];
  }

  get top() { return this.view.top ?? this.spec.top; }
  rows() { return this.spec.rows; }
  column(index) { return this.view.columns ? this.view.columns[index] : (this.spec.columns || [])[index] ?? index; }

  layout(wide) {
    const rows = this.rows(), count = this.view.z[0].length;
    const longest = Math.max(...rows.map((label) => widthOf(label)), widthOf(this.spec.row));
    const left = Math.ceil(Math.min(longest, wide < 480 ? 84 : LABELS)) + 8;
    const high = Math.max(5, Math.min(TALLEST, 520 / rows.length));
    return { wide, left, high, step: (wide - left) / count, tall: rows.length * high + 36 };
  }

  draw() {
    if (!this.div.clientWidth) return;
    const { canvas } = this, context = canvas.getContext("2d"), ratio = window.devicePixelRatio || 1;
    Object.assign(this, this.layout(this.div.clientWidth));
    canvas.width = Math.round(this.wide * ratio);
    canvas.height = Math.round(this.tall * ratio);
    canvas.style.height = `${this.tall}px`;
    context.scale(ratio, ratio);
    this.paint(new CanvasPen(context), this);
    if (this.at) {
      context.strokeStyle = color("@ink");
      context.lineWidth = 2;
      context.strokeRect(this.left + this.at[1] * this.step - 1, this.at[0] * this.high - 1, Math.max(this.step + 1, 5), this.high + 1);
    }
  }

  paint(pen, layout) {
    this.cells(pen, layout);
    this.axes(pen, layout);
  }

  cells(pen, { left, high, step }) {
    const { view } = this, palette = ramp(this.spec.scale, this.top), none = color("@line"), dash = color("@muted");
    const gapX = step >= 5 ? 1 : 0, gapY = high >= 8 ? 1 : 0;
    view.z.forEach((row, y) => row.forEach((value, x) => {
      const fill = value == null ? none : palette[Math.max(0, Math.min(255, Math.round((255 * value) / this.top)))];
      const from = left + x * step;
      pen.box(gapX ? from : Math.floor(from), y * high, gapX ? step - 1 : Math.ceil(step), high - gapY, fill);
      if (value == null) pen.box(from + step / 2 - 2, (y + 0.5) * high - 0.5, 4, 1, dash);
    }));
    for (const at of this.spec.borders || []) pen.box(left + at * step - 1, 0, 1, view.z.length * high + 4, color("@ink"));
  }

  axes(pen, { wide, left, high, step }) {
    const { view, spec } = this, rows = this.rows(), count = view.z[0].length, soft = color("@soft"), muted = color("@muted");
    const every = [1, 2, 4, 8, 16, 32].find((n) => n * high >= 14) || rows.length;
    rows.forEach((label, y) => { if (y % every === 0) pen.text(clipped(label, left - 8), left - 8, Math.max(7, (y + 0.5) * high), soft, "right"); });
    const bottom = rows.length * high + 10;
    pen.text(spec.row, left - 8, bottom, muted, "right");
    const few = [1, 2, 4, 8, 16, 32, 64, 128, 256].find((n) => n * step >= 30) || count;
    if (!view.columns || few === 1) // in an order of their own, some alone would say nothing
      for (let x = 0; x < count; x += few)
        pen.text(clipped(String(this.column(x)), few * step - 3), left + (x + 0.5) * step, bottom, muted, "center");
    const asked = report.menus[this.div.dataset.menu][chosen[this.div.dataset.menu] || 0];
    const other = asked && asked !== view.label ? `, at ${view.label}` : ""; // it has no such layer or step
    pen.text(clipped(spec.column + other, wide - left), left + (count * step) / 2, bottom + 16, muted, "center");
  }

  point(event) {
    const x = Math.floor((event.offsetX - this.left) / this.step), y = Math.floor(event.offsetY / this.high);
    if (x < 0 || y < 0 || y >= this.rows().length || x >= this.view.z[0].length) { tip.hidden = true; return; }
    this.show([y, x], event.pageX, event.pageY);
  }

  words([y, x]) {
    const value = this.view.z[y][x];
    return `${this.spec.row} ${this.rows()[y]}, ${this.spec.cell} ${this.column(x)}: ${short(value)}${value == null ? "" : this.view.unit ?? this.spec.unit}`;
  }

  show(cell, pageX, pageY) {
    tip.textContent = this.words(cell);
    tip.hidden = false;
    const wide = root.clientWidth;
    tip.style.left = `${Math.max(8, Math.min(pageX + 12, wide - tip.offsetWidth - 8))}px`;
    tip.style.top = `${pageY + 16}px`;
  }

  tell(cell) {
    const box = this.canvas.getBoundingClientRect();
    this.show(cell, box.left + scrollX + this.left + cell[1] * this.step, box.top + scrollY + (cell[0] + 1) * this.high);
    say(this.words(cell));
  }

  key(event) {
    const last = [this.rows().length - 1, this.view.z[0].length - 1];
    const [y, x] = this.at || [0, -1];
    const to = { ArrowRight: [y, x + 1], ArrowLeft: [y, x - 1], ArrowDown: [y + 1, x], ArrowUp: [y - 1, x], Home: [y, 0], End: [y, last[1]],
                 PageDown: [last[0], x], PageUp: [0, x] }[event.key]; // prettier-ignore
    if (event.key === "Escape") { this.at = null; tip.hidden = true; this.draw(); }
    if (!to || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    this.at = to.map((value, axis) => Math.max(0, Math.min(value, last[axis])));
    this.draw();
    this.tell(this.at);
  }

  asRows() {
    const names = this.view.z[0].map((_, x) => this.column(x));
    return [[this.spec.row, ...names.map((name) => `${this.spec.cell} ${name}`)], ...this.view.z.map((row, y) => [this.rows()[y], ...row])];
  }
}

// 256 colours between the stops of a scale, in the colours of the scheme.
function ramp(scale, top) {
  const points = stops(scale, top).map(([at, hex]) => [at, rgb(hex)]);
  return Array.from({ length: 256 }, (_, index) => {
    const at = index / 255, next = Math.max(1, points.findIndex(([end]) => end >= at));
    const [[a, from], [b, to]] = [points[next - 1], points[next]];
    return `rgb(${from.map((one, c) => Math.round(one + ((to[c] - one) * (at - a)) / (b - a || 1))).join()})`;
  });
}

const maps = [...document.querySelectorAll(".map")].map((div) => new HeatMap(div));

// The key of a menu's colours: filled from its first map, for its scale may change with what is shown.
for (const key of document.querySelectorAll(".scale[data-key]")) {
  const map = maps.find(({ div }) => div.dataset.menu === key.dataset.key);
  if (!map) continue;
  const strip = make("span", { class: "ramp" }), most = make("span");
  const even = make("span", { class: "even", text: "1 = even", hidden: map.spec.scale !== "ratio" });
  strip.append(even);
  key.append("0 ", strip, " ", most);
  const fill = () => {
    strip.style.background = `linear-gradient(to right,${stops(map.spec.scale, map.top).map(([at, hex]) => `${hex} ${100 * at}%`).join(",")})`;
    even.style.left = `${100 / map.top}%`;
    most.textContent = map.spec.scale === "ratio" ? `${short(map.top)}×` : short(map.top);
  };
  redraws.push(fill);
  follow(map.div.dataset.menu, fill);
  fill();
}
