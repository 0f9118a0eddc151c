// The conditions: a tab for each, where its image comes from, how strongly it applies; and the brushes.

import { $, number, rove, sentence, wrap } from "./dom.js";
import { changed, typed } from "./drawing.js";
import { painting, state } from "./state.js";

const SHORT = { canny: "Canny" }; // tabs are narrow

/** A tab for each condition of the model, which keeps what it has. */
export function showTabs() {
  for (const condition of state.model.conditions) {
    state.tabs[condition] ??= {
      source: condition === "seg" && state.model.brushes.length ? "paint" : "image",
      image: null, name: "", scale: 1, start: 0, end: 1, pinned: false,
    };
  }
  $("tabs").replaceChildren(...state.model.conditions.map((condition) => {
    const tab = wrap("button", SHORT[condition] ?? sentence(state.hello.conditions[condition]));
    tab.type = "button";
    tab.id = `tab-${condition}`;
    tab.setAttribute("role", "tab");
    tab.setAttribute("aria-controls", "panel");
    tab.onclick = () => { setCondition(condition); changed(); };
    return tab;
  }));
}

export function setCondition(condition) {
  state.condition = condition;
  for (const tab of $("tabs").children) {
    const own = tab.id === `tab-${condition}`;
    tab.setAttribute("aria-selected", own);
    tab.tabIndex = own ? 0 : -1;
    tab.classList.toggle("pinned", Boolean(state.tabs[tab.id.slice(4)].pinned && !own));
    if (own) tab.scrollIntoView({ block: "nearest", inline: "nearest" });
  }
  $("panel").setAttribute("aria-labelledby", `tab-${condition}`);
  showTab();
}

export function showTab() {
  const tab = state.tabs[state.condition], title = state.hello.conditions[state.condition];
  const paintable = state.condition === "seg" && state.model.brushes.length > 0;
  const extractable = state.model.extractors.includes(state.condition);
  if ((tab.source === "paint" && !paintable) || (tab.source === "photo" && !extractable)) tab.source = "image";
  $("source-paint").hidden = !paintable;
  $("source-photo").querySelector("input").disabled = !extractable;
  document.querySelector(`input[name="source"][value="${tab.source}"]`).checked = true;
  const paints = tab.source === "paint";
  $("canvas").hidden = $("paint").hidden = !paints;
  $("upload").hidden = $("files").hidden = paints;
  $("canvas").setAttribute("aria-label", `The painted ${title}`);
  $("example").hidden = !state.model.examples.includes(state.condition);
  $("hint").textContent = tab.source === "photo"
    ? `Drop a photo here, paste it, choose a file or take one with the camera: its ${title} will be extracted.`
    : `Drop an image of ${title} here, paste it, or choose a file.`;
  $("name").textContent = tab.name;
  $("upload").classList.toggle("full", Boolean(tab.image));
  $("given").hidden = !tab.image;
  $("given").alt = tab.image ? `The given image: ${tab.name}` : "";
  if (tab.image) $("given").src = tab.url;
  for (const name of ["scale", "start", "end"]) $(name).value = tab[name];
  $("pinned").checked = tab.pinned;
  showStrength();
}

function showStrength() {
  const { scale, start, end, pinned } = state.tabs[state.condition];
  const plain = scale === 1 && start === 0 && end === 1 && !pinned;
  $("strength-shown").textContent = plain ? "" : `: ${scale}, ${start} to ${end}${pinned ? ", kept" : ""}`;
}

export function setImage(condition, bytes, name) {
  const tab = state.tabs[condition];
  if (tab.url) URL.revokeObjectURL(tab.url);
  tab.image = bytes;
  tab.name = name;
  tab.url = URL.createObjectURL(new Blob([bytes]));
}

// --- brushes

export function showBrushes() {
  const brushes = state.model.brushes;
  $("brushes").replaceChildren(...brushes.map((brush, i) => {
    const swatch = document.createElement("i"), button = wrap("button", swatch, wrap("span", brush.name));
    button.type = "button";
    button.setAttribute("role", "radio");
    button.title = i < 9 ? `${brush.name} (${i + 1})` : brush.name;
    swatch.style.background = `rgb(${brush.color.join(" ")})`;
    button.onclick = () => setBrush(i);
    return button;
  }));
  setBrush(Math.max(0, brushes.findIndex((brush) => brush.name === "tree")));
}

function setBrush(i) {
  if (!state.model.brushes[i]) return;
  painting.brush = state.model.brushes[i].label;
  [...$("brushes").children].forEach((button, j) => {
    button.setAttribute("aria-checked", i === j);
    button.tabIndex = i === j ? 0 : -1;
  });
}

export function setWidth(value) {
  $("width").value = value;
  painting.diameter = Number($("width").value) * painting.w / 128; // as wide on the screen whatever the model's size
  $("width-shown").textContent = $("width").value;
  if (!$("ring").hidden) painting.showRing();
}

function setFilling(on) {
  painting.filling = on;
  $("fill").setAttribute("aria-pressed", on);
}

export function setUpConditions() {
  rove("tabs", (i) => { setCondition(state.model.conditions[i]); changed(); });
  rove("brushes", setBrush);
  for (const box of document.querySelectorAll('input[name="source"]')) {
    box.onchange = () => { state.tabs[state.condition].source = box.value; showTab(); changed(); };
  }
  for (const name of ["scale", "start", "end"]) {
    $(name).oninput = () => { state.tabs[state.condition][name] = number(name) ?? (name === "start" ? 0 : 1); showStrength(); typed(); };
  }
  $("pinned").onchange = () => { state.tabs[state.condition].pinned = $("pinned").checked; showStrength(); changed(); };
  $("width").oninput = () => setWidth($("width").value);
  $("fill").onclick = () => setFilling(!painting.filling);
  $("undo").onclick = () => painting.undo();
  $("clear").onclick = () => painting.clear();
  $("canvas").addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (/^[1-9]$/.test(event.key)) setBrush(Number(event.key) - 1);
    else if (event.key === "[") setWidth(Number($("width").value) - 1);
    else if (event.key === "]") setWidth(Number($("width").value) + 1);
    else if (event.key === "f") setFilling(!painting.filling);
  });
}
