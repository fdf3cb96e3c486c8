// Tables that sort by a column and copy as CSV or Markdown; the figures copy their numbers the same way.
const MARK = { none: "", ascending: " ▲", descending: " ▼" };

function cellsOf(table, exact) {
  return [...table.rows].map((row) => [...row.cells].flatMap((cell) => {
    const text = exact && cell.dataset.value != null ? cell.dataset.value : (cell.dataset.name ?? words(cell));
    return [text, ...Array(cell.colSpan - 1).fill("")];
  }));
}

function words(cell) {
  const copy = cell.cloneNode(true);
  copy.querySelectorAll("small, .floor").forEach((part) => part.prepend(" "));
  copy.querySelectorAll("br").forEach((part) => part.replaceWith("; "));
  copy.querySelectorAll(".sign").forEach((part) => part.remove());
  return copy.textContent.replace(/\s+/g, " ").trim();
}

// A spreadsheet would run a name that begins like a formula: it gets an apostrophe. Numbers keep their sign.
function csv(rows) {
  const one = (value) => {
    let text = value == null ? "" : String(value).replace(/−(?=\d)/g, "-");
    if (/^[=+\-@\t\r]/.test(text) && Number.isNaN(Number(text))) text = `'${text}`;
    return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };
  return rows.map((row) => row.map(one).join(",")).join("\n") + "\n";
}

function markdown([head, ...rows]) {
  const line = (row) => `| ${row.map((cell) => String(cell).replace(/[\\|<>`*_[\]]/g, "\\$&")).join(" | ")} |`;
  return [line(head), `|${head.map(() => "---").join("|")}|`, ...rows.map(line)].join("\n") + "\n";
}

async function copy(text, what) {
  try {
    await navigator.clipboard.writeText(text);
  } catch { // an older way, for browsers that keep the clipboard from files
    const area = document.body.appendChild(make("textarea", { class: "unseen" }));
    area.value = text;
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    if (!done) { notice("The browser does not let this page copy."); return; }
  }
  notice(`Copied ${what}`);
}

const toast = document.body.appendChild(make("div", { class: "toast", hidden: true, "aria-hidden": "true" }));
let fading = 0;
function notice(text) {
  toast.textContent = text;
  toast.hidden = false;
  say(text);
  clearTimeout(fading);
  fading = setTimeout(() => { toast.hidden = true; }, 2500);
}

function sort(table, column, direction) {
  const body = table.tBodies[0], sign = direction === "descending" ? -1 : 1;
  const key = (row) => row.cells[column].dataset.value ?? words(row.cells[column]);
  const compare = (a, b) => {
    const [x, y] = [key(a), key(b)], [p, q] = [x === "" ? NaN : Number(x), y === "" ? NaN : Number(y)];
    if (Number.isNaN(p) !== Number.isNaN(q)) return Number.isNaN(p) ? 1 : -1; // what was not measured stays below
    return sign * (Number.isNaN(p) ? x.localeCompare(y, undefined, { numeric: true }) : p - q);
  };
  body.append(...[...body.rows].sort(compare));
  for (const [index, head] of [...table.tHead.rows[0].cells].entries()) {
    const state = index === column ? direction : "none";
    head.setAttribute("aria-sort", state);
    head.querySelector(".sign").textContent = MARK[state];
  }
}

for (const table of document.querySelectorAll("table[data-table]")) {
  const name = table.dataset.table;
  const columns = [...table.tHead.rows[0].cells];
  if (!table.closest(".few")) for (const row of table.tBodies[0].rows) { // on a phone more columns than a head can hold
    for (const cell of row.cells) if (cell.matches("td:not(.why)")) cell.dataset.of = words(columns[cell.cellIndex]);
  }
  if (table.dataset.sorts) for (const [index, head] of [...table.tHead.rows[0].cells].entries()) {
    const button = make("button", { class: "sort", type: "button" }, ...head.childNodes, make("span", { class: "sign", "aria-hidden": "true" }));
    head.append(button);
    head.setAttribute("aria-sort", "none");
    button.addEventListener("click", () => {
      const first = head.classList.contains("left") || index === 0 ? "ascending" : "descending";
      const other = first === "ascending" ? "descending" : "ascending";
      const direction = head.getAttribute("aria-sort") === first ? other : first;
      sort(table, index, direction);
      remember({ sorted: { ...memory.sorted, [name]: [index, direction] } });
      say(`sorted by ${words(head)}, ${direction}`);
    });
  }
  const kept = (memory.sorted || {})[name];
  if (kept && table.dataset.sorts && kept[0] < table.tHead.rows[0].cells.length) sort(table, ...kept);
  const rows = () => `${table.tBodies[0].rows.length} rows`;
  const tools = make("div", { class: "copies", role: "group", "aria-label": `copy the table: ${table.getAttribute("aria-label") || name}` },
    button("Copy CSV", () => copy(csv(cellsOf(table, true)), `${rows()} as CSV`)),
    button("Copy Markdown", () => copy(markdown(cellsOf(table, false)), `${rows()} as Markdown`)));
  (table.closest(".wide") || table).after(tools);
}

function button(text, press) {
  const made = make("button", { class: "quiet", type: "button", text });
  made.addEventListener("click", press);
  return made;
}

function takeOut(div, last, rows, what, drawing) {
  const title = div.dataset.title;
  last.after(make("div", { class: "copies", role: "group", "aria-label": `take out: ${title}` },
    button("Copy data", () => copy(csv(rows()), `the ${what} as CSV`)), button("Save SVG", () => save(div, drawing()))));
}
for (const div of plots) takeOut(div, div.nextElementSibling, () => linesAsRows(div), "curves", () => linesAsSvg(div));
for (const map of maps) takeOut(map.div, map.div, () => map.asRows(), "map", () => mapAsSvg(map));
