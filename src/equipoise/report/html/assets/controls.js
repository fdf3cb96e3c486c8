// Menus, sliders, chips and folds; the first drawing; the refresh of a page whose run still goes on.
for (const menu of document.querySelectorAll("select[data-menu]")) {
  const name = menu.dataset.menu;
  menu.selectedIndex = chosen[name] = recalled(name, menu.querySelector("[selected]")?.index ?? 0);
  menu.addEventListener("change", () => choose(name, menu.selectedIndex));
}
for (const slider of document.querySelectorAll("input[data-menu]")) {
  const name = slider.dataset.menu, labels = report.menus[name], shown = slider.parentElement.querySelector("output");
  const tell = () => {
    slider.value = chosen[name];
    shown.textContent = labels[chosen[name]];
    slider.setAttribute("aria-valuetext", labels[chosen[name]]);
  };
  slider.max = labels.length - 1;
  chosen[name] = recalled(name, Number(slider.dataset.start));
  slider.addEventListener("input", () => choose(name, Number(slider.value)));
  follow(name, tell);
  tell();
}

function press(strategy) {
  for (const same of document.querySelectorAll(`.chip[data-strategy="${strategy}"]`))
    same.setAttribute("aria-pressed", String(!hidden.has(strategy)));
}
for (const strategy of hidden) press(strategy);
for (const chip of document.querySelectorAll(".chip[data-strategy]")) {
  chip.addEventListener("click", () => {
    const strategy = Number(chip.dataset.strategy);
    if (!hidden.delete(strategy)) hidden.add(strategy);
    press(strategy);
    remember({ hidden: [...hidden] });
    plots.filter((div) => div.dataset.lines).forEach(drawLines);
  });
}
const folds = [...document.querySelectorAll("details")];
folds.forEach((fold, index) => {
  fold.open = memory.open.includes(index) || fold.open;
  fold.addEventListener("toggle", () => remember({ open: folds.flatMap((one, at) => (one.open ? [at] : [])) }));
});

redrawAll();

// --- a page whose run goes on ----------------------------------------------------------------------------------------

const focusable = () => [...document.querySelectorAll("button, select, input, [tabindex], summary")];
if (memory.scroll) {
  scrollTo(...memory.scroll);
  focusable()[memory.focus]?.focus({ preventScroll: true });
  remember({ scroll: null, focus: -1 });
}
await loadPlotly();
root.dataset.drawn = "yes";

const live = document.getElementById("live");
if (live) {
  const seconds = Number(live.dataset.seconds), pause = live.querySelector("button");
  let touched = 0;
  for (const kind of ["pointerdown", "keydown", "wheel", "touchmove"])
    addEventListener(kind, () => { touched = Date.now(); }, { passive: true });
  const state = () => {
    pause.textContent = memory.paused ? "Go on refreshing" : "Pause";
    pause.setAttribute("aria-pressed", String(memory.paused));
  };
  state();
  pause.addEventListener("click", () => { remember({ paused: !memory.paused }); state(); });
  setInterval(() => { // not while somebody moves, types, or reads another tab
    if (memory.paused || document.hidden || Date.now() - touched < 1000) return;
    remember({ scroll: [scrollX, scrollY], focus: focusable().indexOf(document.activeElement) });
    location.reload();
  }, seconds * 1000);
}
