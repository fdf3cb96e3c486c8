// The text view, where tokens have the colour of their expert, and what a single expert reads.
const UNSEEN = /[\p{Cc}\p{Cf}\p{Cs}\p{Zl}\p{Zp}]/gu;
const visible = (text) => text.replace(UNSEEN, (char) => ({ "\n": "⏎", "\t": "⇥" })[char] || `\\u${char.codePointAt(0).toString(16).padStart(4, "0")}`);

// Neighbouring numbers get far hues; the number stands beside every token, for nobody tells 128 colours apart.
function expertColor(expert) {
  const hue = (expert * 137.508) % 360, night = dark.matches && !print.matches;
  const light = night ? [23, 28, 19][expert % 3] : [88, 80, 93][expert % 3];
  return `hsl(${hue} ${night ? 55 : 68}% ${light}%)`;
}

function picker(label, names, at, pick) {
  const select = make("select", {}, ...names.map((name, index) => make("option", { text: name, selected: index === at })));
  select.addEventListener("change", () => pick(select.selectedIndex));
  return names.length > 1 ? make("label", { class: "menu" }, `${label} `, select) : "";
}

function ranger(label, names, at, move) {
  const input = make("input", { type: "range", min: "0", max: String(names.length - 1), step: "1" });
  const output = make("output");
  const show = () => {
    output.textContent = names[input.value];
    input.setAttribute("aria-valuetext", names[input.value]);
  };
  input.value = at;
  show();
  input.addEventListener("input", () => { show(); move(Number(input.value)); });
  return names.length > 1 ? make("label", { class: "slider" }, `${label} `, input, " ", output) : "";
}

const within = (index, list) => Math.max(0, Math.min(index || 0, list.length - 1));

// --- passages --------------------------------------------------------------------------------------------------------

class Passages {
  constructor(box, models) {
    Object.assign(this, { box, models, at: { model: 0, passage: 0, layer: 0, ...memory.passages }, lit: null, token: -1 });
    this.build();
    redraws.push(() => this.color());
  }

  keep(change) {
    Object.assign(this.at, change);
    remember({ passages: this.at });
  }

  build() {
    const { at } = this, model = this.models[(at.model = within(at.model, this.models))];
    at.passage = within(at.passage, model.passages);
    at.layer = within(at.layer, model.layers);
    const again = (key) => (index) => { this.keep({ [key]: index }); this.token = -1; this.lit = null; this.build(); };
    const names = model.passages.map((one, index) => `${index + 1}: ${one.domain}`);
    this.told = make("p", { class: "told", "aria-hidden": "true" });
    this.list = make("div", { class: "tokens", role: "listbox", tabindex: "0", dir: "auto" });
    this.box.replaceChildren(
      make("div", { class: "tools" }, picker("Model", this.models.map((one) => one.name), at.model, again("model")),
        picker("Passage", names, at.passage, again("passage")),
        ranger("Show", model.layers.map((layer) => `layer ${layer}`), at.layer, (layer) => { this.keep({ layer }); this.color(); })),
      this.told, this.list);
    const passage = model.passages[at.passage];
    if (!passage) return;
    this.spans = passage.ids.map((id, index) => {
      const text = model.strings[id] ?? "";
      const span = make("span", { role: "option", id: `token-${index}`, class: "token" }, make("bdi", { text: visible(text) }), make("sub"));
      this.list.append(span, ...(text.includes("\n") ? [make("br")] : []));
      return span;
    });
    this.list.addEventListener("keydown", (event) => this.key(event));
    this.list.addEventListener("focus", () => this.go(Math.max(0, this.token)));
    this.list.addEventListener("pointerover", (event) => this.tell(this.spans.indexOf(event.target.closest(".token"))));
    this.list.addEventListener("click", (event) => this.light(this.spans.indexOf(event.target.closest(".token"))));
    this.color();
  }

  experts(index) {
    const model = this.models[this.at.model], k = model.top_k;
    return model.passages[this.at.passage].experts[this.at.layer].slice(index * k, (index + 1) * k).filter((one) => one >= 0);
  }

  color() {
    if (!this.spans) return;
    const model = this.models[this.at.model], layer = model.layers[this.at.layer];
    this.list.setAttribute("aria-label", `${model.passages[this.at.passage].domain}: the tokens and their experts in layer ${layer}. Enter keeps an expert lit`);
    this.spans.forEach((span, index) => {
      const chosen = this.experts(index), on = this.lit == null || chosen.includes(this.lit);
      span.lastChild.textContent = chosen[0] ?? "–";
      span.style.background = chosen.length ? expertColor(this.lit != null && on ? this.lit : chosen[0]) : "";
      span.classList.toggle("off", !on);
      span.setAttribute("aria-selected", String(this.lit != null && on));
      span.setAttribute("aria-label", `${span.firstChild.textContent}: expert ${chosen.join(", ") || "none"}`);
    });
    this.tell(this.token);
  }

  tell(index) {
    if (!this.spans[index]) {
      this.told.textContent = this.lit == null ? "Point at a token, or focus the text and use the arrow keys." : `Expert ${this.lit} is lit. Escape shows all.`;
      return;
    }
    const [first, ...rest] = this.experts(index);
    this.told.replaceChildren(make("bdi", { class: "quoted", text: this.spans[index].firstChild.textContent }), ` expert ${first ?? "none"}`,
      rest.length ? `, then ${rest.join(", ")}` : "", this.lit == null ? "" : ` · expert ${this.lit} is lit`);
  }

  go(index) {
    this.spans[this.token]?.classList.remove("here");
    this.token = within(index, this.spans);
    this.spans[this.token].classList.add("here");
    this.list.setAttribute("aria-activedescendant", `token-${this.token}`);
    const box = this.spans[this.token].getBoundingClientRect();
    if (box.top < 0 || box.bottom > innerHeight) this.spans[this.token].scrollIntoView({ block: "center" });
    this.tell(this.token);
  }

  light(index) {
    if (!this.spans[index]) return;
    const [first] = this.experts(index);
    this.lit = this.lit === first ? null : (first ?? null);
    this.color();
    say(this.lit == null ? "all experts shown" : `expert ${this.lit} lit, ${this.spans.filter((span) => !span.classList.contains("off")).length} tokens`);
  }

  beside(step) { // the token above or below: the nearest on the next line
    const here = this.spans[this.token].getBoundingClientRect(), middle = here.left + here.width / 2;
    const lines = this.spans.map((span, index) => ({ index, box: span.getBoundingClientRect() })).filter(({ box }) => (box.top - here.top) * step > here.height / 2);
    if (!lines.length) return this.token;
    const edge = step > 0 ? Math.min(...lines.map(({ box }) => box.top)) : Math.max(...lines.map(({ box }) => box.top));
    const away = ({ box }) => Math.abs(box.left + box.width / 2 - middle);
    return lines.filter(({ box }) => Math.abs(box.top - edge) < 4).reduce((a, b) => (away(a) <= away(b) ? a : b)).index;
  }

  key(event) {
    if (event.ctrlKey || event.altKey || event.metaKey) return;
    const layers = this.models[this.at.model].layers.length;
    switch (event.key) {
      case "ArrowRight": this.go(this.token + 1); break;
      case "ArrowLeft": this.go(this.token - 1); break;
      case "ArrowDown": this.go(this.beside(1)); break;
      case "ArrowUp": this.go(this.beside(-1)); break;
      case "Home": this.go(0); break;
      case "End": this.go(this.spans.length - 1); break;
      case "Enter": case " ": this.light(this.token); break;
      case "Escape": this.lit = null; this.color(); break;
      case "+": case "-": { // another layer without leaving the token
        const layer = within(this.at.layer + (event.key === "+" ? 1 : -1), { length: layers });
        const slider = this.box.querySelector("input[type=range]");
        if (slider) { slider.value = layer; slider.dispatchEvent(new Event("input")); }
        say(`layer ${this.models[this.at.model].layers[layer]}: expert ${this.experts(this.token).join(", ")}`);
        break;
      }
      default: return;
    }
    event.preventDefault();
  }
}

// --- what an expert reads --------------------------------------------------------------------------------------------

class Vocabulary {
  constructor(box, models) {
    Object.assign(this, { box, models, at: { model: 0, layer: 0, expert: 0, ...memory.vocabulary } });
    this.build();
  }

  keep(change) {
    Object.assign(this.at, change);
    remember({ vocabulary: this.at });
  }

  build() {
    const { at } = this, model = this.models[(at.model = within(at.model, this.models))];
    at.layer = within(at.layer, model.layers);
    const number = make("input", { type: "number", min: "0", inputmode: "numeric" });
    const show = () => {
      const experts = model.experts[at.layer];
      at.expert = within(at.expert, experts);
      number.max = experts.length - 1;
      number.value = at.expert;
      this.fill(model, experts[at.expert]);
    };
    number.addEventListener("change", () => { this.keep({ expert: Number(number.value) }); show(); });
    this.rows = make("tbody");
    const heads = ["Token", "Of its choices", "Of the token's", "For example"].map((text, index) =>
      make("th", { scope: "col", text, ...(index % 3 === 0 ? { class: "left" } : {}) }));
    this.table = make("table", { class: "reads" }, make("thead", {}, make("tr", {}, ...heads)), this.rows);
    this.box.replaceChildren(
      make("div", { class: "tools" }, picker("Model", this.models.map((one) => one.name), at.model, (index) => { this.keep({ model: index }); this.build(); }),
        ranger("Show", model.layers.map((layer) => `layer ${layer}`), at.layer, (layer) => { this.keep({ layer }); show(); }),
        make("label", { class: "menu" }, "Expert ", number)),
      make("div", { class: "wide" }, this.table),
      make("div", { class: "copies" }, button("Copy CSV", () => copy(csv(cellsOf(this.table, true)), "the table as CSV"))));
    show();
  }

  fill(model, entries) {
    const percent = (share) => `${(100 * share).toFixed(share < 0.1 ? 1 : 0)}%`;
    this.table.setAttribute("aria-label", `what expert ${this.at.expert} of layer ${model.layers[this.at.layer]} reads`);
    this.rows.replaceChildren(...entries.map(([id, own, its, domain, context]) => {
      const text = (token) => (token < 0 ? "" : visible(model.strings[token] ?? ""));
      const example = make("span", { class: "context" }, make("bdi", { text: context.slice(0, model.half).map(text).join("") }),
        make("mark", {}, make("bdi", { text: text(id) })), make("bdi", { text: context.slice(model.half + 1).map(text).join("") }));
      return make("tr", {}, make("th", { scope: "row", class: "left" }, make("bdi", { class: "quoted", text: text(id) })),
        make("td", { text: percent(own), "data-value": String(own) }), make("td", { text: percent(its), "data-value": String(its) }),
        make("td", { class: "left" }, domain < 0 ? "" : example, make("small", { text: model.domains[domain] ?? "" })));
    }));
    if (!entries.length) this.rows.append(make("tr", {}, make("td", { colSpan: 4, class: "left", text: "No counted token chose it." })));
    say(`expert ${this.at.expert}: ${entries.map(([id]) => visible(model.strings[id] ?? "")).join(", ")}`);
  }
}

const passages = document.getElementById("passages"), vocabulary = document.getElementById("vocabulary");
const reading = passages && new Passages(passages, report.texts.passages);
const knowing = vocabulary && new Vocabulary(vocabulary, report.texts.vocabulary);
