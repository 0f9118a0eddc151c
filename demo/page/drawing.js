// Requests for pictures: one is under way at a time, and the newest one takes its place.

import { $, number } from "./dom.js";
import { clearErrors, showError } from "./errors.js";
import { showPreviews, showResult } from "./results.js";
import { FEW_STEPS, painting, state } from "./state.js";

export function draw() {
  clearTimeout(state.typing);
  clearErrors();
  const parts = [], model = state.model;
  const used = model.conditions.filter((condition) => condition === state.condition || state.tabs[condition].pinned);
  const controls = used.map((condition) => {
    const { source, image, scale, start, end } = state.tabs[condition];
    const control = { condition, scale, start, end, extract: source === "photo" };
    if (source === "paint") control.labels = parts.push(painting.labels.slice());
    else if (image) control.image = parts.push(image);
    return control;
  });
  const record = {
    type: "draw",
    id: ++state.id,
    model: model.id,
    prompt: $("prompt").value,
    negative_prompt: $("negative").value,
    added_prompt: $("added").value,
    images: Number(document.querySelector('input[name="count"]:checked').value),
    steps: number("steps"),
    guidance: number("guidance"),
    scheduler: $("scheduler").value,
    seed: $("seed").value,
    controls,
    init_image: state.begin ? parts.push(state.begin) : null,
    strength: state.begin ? number("amount") : null,
    compare: $("compare").value || null,
    kept: state.kept,
    preview: (number("steps") ?? 0) > FEW_STEPS,
  };
  if (!state.connection.send(record, parts)) {
    showError("the server cannot be reached: the page tries again by itself");
    return;
  }
  state.asked = record.id;
  document.body.dataset.asked = record.id;
  state.sent = performance.now();
  state.stale = false;
  $("stop").disabled = false;
  $("progress").removeAttribute("value");
  $("status").textContent = "waiting";
  $("images").setAttribute("aria-busy", "true");
}

export function progress(record, parts) {
  if (record.id !== state.asked) return;
  $("progress").max = record.steps;
  if (record.position !== null) {
    $("status").textContent = record.position ? `${record.position} before this` : "next";
    return;
  }
  $("progress").value = record.step;
  $("status").textContent = record.step < record.steps ? `step ${record.step} of ${record.steps}` : "finishing";
  if (record.previews?.length) showPreviews(record.previews.map((part) => parts[part]), record.step / record.steps);
}

export async function done(record, parts) {
  const current = () => record.id === state.asked;
  if (!current() || !(await showResult(record, parts, state.hello.conditions, current))) return;
  const again = state.stale && painting.stroke;
  const ended = painting.stroke || state.stale ? null : state.strokeEnded;
  finish();
  showPeek();
  $("progress").value = $("progress").max = 1;
  $("status").textContent = `${((performance.now() - state.sent) / 1000).toFixed(2)} s`;
  if (ended !== null) state.strokeEnded = null;
  tellShown(ended, record.id);
  if (again) draw();
}

export function failed(record) {
  if (state.waiting.has(record.id)) state.waiting.delete(record.id);
  else if (record.id && record.id !== state.asked) return;
  else finish();
  showError(record.message, record.field);
}

/** Nothing is under way any more. */
export function finish() {
  state.asked = 0;
  $("stop").disabled = true;
  $("preview").hidden = true;
  $("progress").value = 0;
  $("status").textContent = "";
  $("images").removeAttribute("aria-busy");
}

export function stop() {
  state.connection.send({ type: "stop" });
  finish(); // whatever still arrives is of no request that the page knows
  $("status").textContent = "stopped";
}

/** The newest stroke takes the place of what is under way; while it lasts, the next picture begins when one is done. */
export function painted(ended, more = true) {
  $("undo").disabled = !painting.undone.length;
  state.stale ||= more;
  if (ended) state.strokeEnded = performance.now();
  if (!$("live").checked) return;
  if (state.stale && (ended || !state.asked)) draw();
  else if (ended && !state.asked) tellShown(state.strokeEnded); // its last picture came before it ended
}

/** A setting has another value. */
export function changed() {
  if (!$("live").checked || !state.model) return;
  const tab = state.tabs[state.condition];
  if (tab.source === "paint" || tab.image) draw(); // a tab that was only opened is no mistake
}

/** A text is being written: a picture of every letter would be too many. */
export function typed() {
  clearTimeout(state.typing);
  state.typing = setTimeout(changed, 350);
}

/** On a phone the picture is below the canvas: a small one follows the brush while the large one is out of sight. */
export function showPeek() { $("peek").hidden = state.seen || !$("images").children.length; }

/** For whoever measures: a picture is on the screen; `ended`: when the stroke ended that it is the answer to. */
function tellShown(ended, id = Number(document.body.dataset.shown)) {
  requestAnimationFrame(() => setTimeout(() => { // after the frame that shows it
    document.body.dataset.shown = id;
    const stroke = ended === null ? null : performance.now() - ended;
    document.dispatchEvent(new CustomEvent("shown", { detail: { id, stroke } }));
  }));
}
