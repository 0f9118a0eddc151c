// Images from outside: examples, files, the clipboard, the camera, and pictures that bring their settings.

import { openCamera } from "./camera.js";
import { setCondition, setImage, showTab } from "./conditions.js";
import { $, wrap } from "./dom.js";
import { changed } from "./drawing.js";
import { clearErrors, showError } from "./errors.js";
import { restoreSettings } from "./settings.js";
import { ask, bytesOf, painting, state } from "./state.js";

export function loadExample(first = false) {
  const condition = state.condition;
  ask({ type: "example", model: state.model.id, condition }, [], (record, parts) => {
    setImage(condition, parts[record.image], "the model's example");
    const tab = state.tabs[condition];
    if (record.labels) painting.load(parts[record.labels]);
    if (tab.source === "photo" || (tab.source === "paint" && !record.labels)) tab.source = "image";
    $("prompt").value = record.prompt;
    $("seed").value = record.seed;
    $("undo").disabled = first || !painting.undone.length;
    showTab();
    clearErrors();
    changed();
  });
}

async function loadFile(file) {
  const bytes = await bytesOf(file), condition = state.condition;
  if (!bytes) return;
  ask({ type: "read", model: state.model.id, condition }, [bytes], (record, parts) => {
    clearErrors();
    if (record.settings) {
      restore(record, parts, file.name);
      return;
    }
    const tab = state.tabs[condition];
    setImage(condition, bytes, file.name);
    if (record.labels && tab.source !== "photo") {
      tab.source = "paint";
      painting.load(parts[record.labels]);
      $("undo").disabled = false;
    } else if (tab.source === "paint") {
      tab.source = state.model.extractors.includes(condition) ? "photo" : "image";
    }
    showTab();
    changed();
  });
}

function restore(record, parts, name) {
  restoreSettings(record.settings, parts[record.init_image], name);
  for (const tab of Object.values(state.tabs)) tab.pinned = false;
  const known = record.controls.filter((control) => state.model.conditions.includes(control.condition));
  for (const control of known) {
    const tab = state.tabs[control.condition];
    Object.assign(tab, { scale: control.scale, start: control.start, end: control.end, pinned: known.length > 1, source: "image" });
    setImage(control.condition, parts[control.image], `from ${name}`);
    if (control.labels) {
      tab.source = "paint";
      painting.load(parts[control.labels]);
    }
  }
  setCondition(known.length ? known[0].condition : state.condition);
  const notes = [`The settings of ${name} are restored.`, ...record.notes];
  $("notes").replaceChildren(...notes.map((note) => wrap("li", note)));
  document.body.dataset.restored = record.id;
  changed();
}

async function paste() {
  try {
    for (const item of await navigator.clipboard.read()) {
      const kind = item.types.find((type) => type.startsWith("image/"));
      if (kind) {
        loadFile(new File([await item.getType(kind)], "the pasted image"));
        return;
      }
    }
    showError("the clipboard holds no image: copy one first");
  } catch {
    showError("the browser does not give the clipboard to the page: press Ctrl+V instead");
  }
}

/** What the camera sees is a photo, wherever its condition can be extracted. */
async function photograph() {
  const bytes = await openCamera();
  if (!bytes) return;
  const tab = state.tabs[state.condition];
  if (state.model.extractors.includes(state.condition)) tab.source = "photo";
  setImage(state.condition, bytes, "from the camera");
  clearErrors();
  showTab();
  changed();
}

export function setUpFiles() {
  $("example").onclick = () => loadExample();
  $("choose").onclick = () => $("file").click();
  $("file").onchange = () => { if ($("file").files[0]) loadFile($("file").files[0]); $("file").value = ""; };
  $("paste").onclick = paste;
  $("camera").onclick = photograph;
  document.addEventListener("paste", (event) => {
    const file = [...event.clipboardData.files].find((each) => each.type.startsWith("image/"));
    if (file && state.hello) { event.preventDefault(); loadFile(file); }
  });
  let dragged = 0;
  const carriesFiles = (event) => event.dataTransfer?.types.includes("Files");
  document.addEventListener("dragenter", (event) => { if (carriesFiles(event)) { dragged++; $("drop").hidden = false; } });
  document.addEventListener("dragleave", (event) => { if (carriesFiles(event) && --dragged <= 0) { dragged = 0; $("drop").hidden = true; } });
  document.addEventListener("dragover", (event) => { if (carriesFiles(event)) event.preventDefault(); });
  document.addEventListener("drop", (event) => {
    if (!carriesFiles(event)) return;
    event.preventDefault();
    dragged = 0;
    $("drop").hidden = true;
    const file = event.dataTransfer.files[0];
    if (file && state.hello) loadFile(file);
  });
}
