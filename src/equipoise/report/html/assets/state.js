// What the page holds and remembers: the packed data, the colours of the scheme, what a reader has chosen.
const root = document.documentElement;

async function unpacked(id) {
  const bytes = Uint8Array.from(atob(document.getElementById(id).textContent.trim()), (char) => char.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
}

if (!("DecompressionStream" in window)) {
  document.getElementById("too-old").hidden = false;
  throw new Error("this browser cannot unpack the figures of the page");
}
const report = JSON.parse(await unpacked("report-data"));
const coarse = matchMedia("(pointer: coarse)").matches;

// Survives a reload, in this tab only: a page that is being refreshed keeps its sliders, and no file is written.
const memory = { chosen: {}, hidden: [], open: [], paused: false, ...(history.state || {}).equipoise };
const hidden = new Set(memory.hidden); // strategies switched off
const chosen = {}; // menu -> index of the view
const followers = {}; // menu -> functions that draw what it governs

function remember(change) {
  Object.assign(memory, change);
  history.replaceState({ equipoise: memory }, "");
}

function choose(menu, index) {
  const labels = report.menus[menu];
  chosen[menu] = Math.max(0, Math.min(index, labels.length - 1));
  memory.chosen[menu] = { label: labels[chosen[menu]], last: chosen[menu] === labels.length - 1 };
  remember({});
  (followers[menu] || []).forEach((draw) => draw());
}

function follow(menu, draw) {
  (followers[menu] ||= []).push(draw);
}

function recalled(menu, fallback) {
  const labels = report.menus[menu], kept = memory.chosen[menu];
  if (!kept) return fallback;
  const at = kept.last ? labels.length - 1 : labels.indexOf(kept.label); // who looked at the newest sees the newest
  return at < 0 ? fallback : at;
}

// --- colours ---------------------------------------------------------------------------------------------------------

const dark = matchMedia("(prefers-color-scheme: dark)"), print = matchMedia("print");
const cycled = (strategy) => (strategy < 8 ? strategy : 1 + ((strategy - 1) % 7)); // the baseline's grey stays its own

function color(token) {
  const [name, alpha] = token.slice(1).split("/");
  const strategy = /^s(\d+)$/.exec(name);
  const hex = getComputedStyle(root).getPropertyValue("--" + (strategy ? "s" + cycled(Number(strategy[1])) : name)).trim();
  return alpha ? `rgba(${rgb(hex).join()},${alpha})` : hex;
}

const rgb = (hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));

function stops(scale, top) {
  if (scale === "amount") return [[0, "share-even"], [0.5, "share-high"], [1, "share-top"]].map(([at, name]) => [at, color("@" + name)]);
  return [[0, "share-low"], [1 / top, "share-even"], [(1 + (top - 1) * 0.45) / top, "share-high"], [1, "share-top"]]
    .map(([at, name]) => [at, color("@" + name)]);
}

const redraws = [];
const redrawAll = () => redraws.forEach((draw) => draw());
for (const media of [dark, print]) media.addEventListener("change", redrawAll);

// --- words -----------------------------------------------------------------------------------------------------------

const spoken = document.getElementById("spoken"); // what a screen reader says when something changed
let saying = 0;
function say(text) {
  clearTimeout(saying);
  saying = setTimeout(() => { spoken.textContent = text; }, 80);
}

function make(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes))
    if (key === "text") made.textContent = value;
    else if (key in made && typeof value !== "string") made[key] = value;
    else made.setAttribute(key, value);
  made.append(...children);
  return made;
}

const short = (value) => (value == null ? "not measured" : Math.abs(value) >= 100 ? value.toFixed(0) : String(Number(value.toPrecision(3))));
