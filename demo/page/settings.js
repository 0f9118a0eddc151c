// The model and the settings of a request.

import { setBegin } from "./begin.js";
import { $, choice } from "./dom.js";
import { setCondition, setWidth, showBrushes, showTabs } from "./conditions.js";
import { changed, draw, typed } from "./drawing.js";
import { FEW_STEPS, painting, state } from "./state.js";

/** The choices that the server offers. */
export function showChoices() {
  const { models, schedulers, limits } = state.hello;
  $("model").replaceChildren(...models.map((model) => new Option(model.id, model.id)));
  $("scheduler").replaceChildren(...Object.entries(schedulers).map(([name, title]) => new Option(title, name)));
  const counts = Array.from({ length: Math.min(4, limits.images) }, (_, i) => i + 1);
  $("counts").append(...counts.map((n) => choice("count", n, String(n), n === 1)));
  setModel(models[0].id);
}

export function setModel(id) {
  const model = state.model = state.hello.models.find((each) => each.id === id) ?? state.hello.models[0];
  $("model").value = model.id;
  $("facts").textContent = `${model.width} × ${model.height}, ${model.precision}, ${[...new Set(model.backends)].join(", ")}`;
  document.documentElement.style.setProperty("--ratio", `${model.width} / ${model.height}`);
  painting.setBrushes(model.brushes);
  painting.resize(model.width, model.height);
  setWidth($("width").value);
  painting.show();
  showBrushes();
  showTabs();
  setCondition(model.conditions.includes(state.condition) ? state.condition : model.conditions[0]);
  showOthers();
  useDefaults();
}

/** The models that draw pictures of the same size, to compare with. */
function showOthers() {
  const before = $("compare").value, { width, height, id } = state.model;
  const others = state.hello.models.filter((each) => each.id !== id && each.width === width && each.height === height);
  $("compare").replaceChildren(new Option("nothing", ""), ...others.map((each) => new Option(each.id, each.id)));
  $("compare").value = others.some((each) => each.id === before) ? before : "";
  $("compare").closest("label").hidden = !others.length;
}

function useDefaults() {
  const { num_inference_steps: steps, guidance_scale: guidance, scheduler } = state.model.defaults;
  $("steps").value = steps;
  $("guidance").value = guidance;
  $("scheduler").value = scheduler;
  $("live").checked = steps <= FEW_STEPS;
}

/** The settings of a picture, as the server read them from it. */
export function restoreSettings(settings, begin, name) {
  setModel(settings.model);
  const names = { prompt: "prompt", negative: "negative_prompt", steps: "steps", guidance: "guidance", scheduler: "scheduler", seed: "seed" };
  for (const [id, key] of Object.entries(names)) $(id).value = settings[key];
  $("added").value = "";
  setCount(settings.images);
  setKept(settings.kept);
  setBegin(begin, `from ${name}`);
  if (begin) $("amount").value = settings.strength;
}

function setCount(n) {
  const box = document.querySelector(`input[name="count"][value="${n}"]`);
  if (box) box.checked = true;
  else $("counts").append(choice("count", n, String(n), true)); // a picture of a larger request
}

function setKept(kept) {
  state.kept = kept;
  const words = Object.entries(kept).map(([key, value]) => (value === true ? key : `${key} ${value}`).replaceAll("_", " "));
  $("kept").hidden = !words.length;
  $("kept").firstElementChild.textContent = `Also from the picture: ${words.join(", ")}`;
}

export function setUpSettings() {
  $("model").onchange = () => { setModel($("model").value); changed(); };
  $("settings").onsubmit = (event) => { event.preventDefault(); draw(); };
  // A choice is made at once, a text letter by letter.
  $("settings").oninput = (event) => {
    if (event.target.type === "file") return;
    if (event.target.type === "radio" || event.target.tagName === "SELECT") changed();
    else typed();
  };
  $("defaults").onclick = () => { const live = $("live").checked; useDefaults(); $("live").checked = live; changed(); };
  $("forget").onclick = () => { setKept({}); changed(); };
  $("dice").onclick = () => { $("seed").value = crypto.getRandomValues(new Uint32Array(1))[0]; changed(); };
}
