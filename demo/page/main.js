// The page: its state, what it asks the server for, and what comes back.

import { Painting } from "./painting.js";
import { showMisses, showPreviews, showResult } from "./results.js";
import { Connection } from "./socket.js";
import { setUpTheme } from "./theme.js";

const $ = (id) => document.getElementById(id);
const FEW_STEPS = 8; // a model of so few steps can follow a brush
// Tabs are narrow.
const SHORT = { canny: "Canny" };
// Fields of a request, as errors name them, and where they are on the page.
const FIELDS = {
  num_inference_steps: "steps", guidance_scale: "guidance", seed: "seed", scheduler: "scheduler", prompt: "prompt",
  negative_prompt: "negative", controlnet_conditioning_scale: "scale", control_guidance_start: "start",
  control_guidance_end: "end",
};

// What errors call them, and what the page does.
const WORDS = {
  num_inference_steps: "steps", guidance_scale: "guidance", negative_prompt: "negative prompt", "n, the images of a request,": "the number of images",
  num_images_per_prompt: "the number of images", controlnet_conditioning_scale: "scale", control_guidance_start: "start",
  control_guidance_end: "end", lcm: "LCM",
};

const state = {
  hello: null,
  model: null,
  condition: null,
  tabs: {}, // of each condition: where it comes from, its image, how strongly
  id: 0, // of the last message that asked for something
  asked: 0, // the last request for pictures; 0: none is under way
  sent: 0, // when, in milliseconds
  stale: false, // something was painted since it was sent
  strokeEnded: null, // when the last stroke ended, until its picture is shown
  kept: {},
  waiting: new Map(), // what is done with the answer to a message
  typing: 0,
  seen: true, // whether the pictures are in sight, or the canvas is not
};

const painting = new Painting($("canvas"), $("ring"), painted);
const connection = new Connection(new URL("ws", location.href.replace(/^http/, "ws")), received, connected);

// --- messages

function received(record, parts) {
  const handler = { hello, progress, done, error, example: answered, content: answered }[record.type];
  handler?.(record, parts);
}

function connected(up) {
  $("connection").textContent = up ? "connected" : "no connection";
  $("connection").classList.toggle("up", up);
  if (!up && state.asked) finish();
  if (!up && state.hello) showError("the connection is lost: the page tries again by itself");
}

function ask(record, parts, then) {
  record.id = ++state.id;
  state.waiting.set(record.id, then);
  if (!connection.send(record, parts)) showError("the server cannot be reached: the page tries again by itself");
}

function answered(record, parts) {
  const then = state.waiting.get(record.id);
  state.waiting.delete(record.id);
  then?.(record, parts);
}

function hello(record) {
  const first = !state.hello;
  state.hello = record;
  $("version").textContent = record.version;
  clearErrors();
  if (!first) return;
  $("model").replaceChildren(...record.models.map((model) => new Option(model.id, model.id)));
  $("scheduler").replaceChildren(...Object.entries(record.schedulers).map(([name, title]) => new Option(title, name)));
  const counts = Array.from({ length: Math.min(4, record.limits.images) }, (_, i) => i + 1);
  $("counts").append(...counts.map((n) => choice("count", n, String(n), n === 1)));
  setModel(record.models[0].id);
  loadExample(true);
}

// --- the model and its conditions

function setModel(id) {
  const model = state.model = state.hello.models.find((each) => each.id === id) ?? state.hello.models[0];
  $("model").value = model.id;
  $("facts").textContent = `${model.width} × ${model.height}, ${model.precision}, ${[...new Set(model.backends)].join(", ")}`;
  document.documentElement.style.setProperty("--ratio", `${model.width} / ${model.height}`);
  painting.setBrushes(model.brushes);
  painting.resize(model.width, model.height);
  setWidth($("width").value);
  painting.show();
  for (const condition of model.conditions) {
    state.tabs[condition] ??= {
      source: condition === "seg" && model.brushes.length ? "paint" : "image",
      image: null, name: "", scale: 1, start: 0, end: 1, pinned: false,
    };
  }
  showBrushes();
  showTabs();
  setCondition(model.conditions.includes(state.condition) ? state.condition : model.conditions[0]);
  useDefaults();
}

function useDefaults() {
  const { num_inference_steps: steps, guidance_scale: guidance, scheduler } = state.model.defaults;
  $("steps").value = steps;
  $("guidance").value = guidance;
  $("scheduler").value = scheduler;
  $("live").checked = steps <= FEW_STEPS;
}

function showTabs() {
  $("tabs").replaceChildren(...state.model.conditions.map((condition) => {
    const tab = document.createElement("button");
    tab.type = "button";
    tab.id = `tab-${condition}`;
    tab.setAttribute("role", "tab");
    tab.setAttribute("aria-controls", "panel");
    tab.textContent = SHORT[condition] ?? sentence(state.hello.conditions[condition]);
    tab.onclick = () => { setCondition(condition); changed(); };
    return tab;
  }));
}

function setCondition(condition) {
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

function showTab() {
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
    ? `Drop a photo here, paste it, or choose a file: its ${title} will be extracted.`
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

function setImage(condition, bytes, name) {
  const tab = state.tabs[condition];
  if (tab.url) URL.revokeObjectURL(tab.url);
  tab.image = bytes;
  tab.name = name;
  tab.url = URL.createObjectURL(new Blob([bytes]));
}

// --- drawing

function draw() {
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
    kept: state.kept,
    preview: (number("steps") ?? 0) > FEW_STEPS,
  };
  if (!connection.send(record, parts)) {
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

function progress(record, parts) {
  if (record.id !== state.asked) return;
  $("progress").max = record.steps;
  if (record.position !== null) {
    $("status").textContent = record.position ? `${record.position} before this` : "next";
    return;
  }
  $("progress").value = record.step;
  $("status").textContent = record.step < record.steps ? `step ${record.step} of ${record.steps}` : "finishing";
  if (record.previews?.length) showPreviews(record.previews.map((number) => parts[number]), record.step / record.steps);
}

async function done(record, parts) {
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

/** For whoever measures: a picture is on the screen; `ended`: when the stroke ended that it is the answer to. */
function tellShown(ended, id = Number(document.body.dataset.shown)) {
  requestAnimationFrame(() => setTimeout(() => { // after the frame that shows it
    document.body.dataset.shown = id;
    const stroke = ended === null ? null : performance.now() - ended;
    document.dispatchEvent(new CustomEvent("shown", { detail: { id, stroke } }));
  }));
}

function error(record) {
  if (state.waiting.has(record.id)) {
    state.waiting.delete(record.id);
  } else if (record.id && record.id !== state.asked) {
    return;
  } else {
    finish();
  }
  showError(record.message, record.field);
}

function finish() {
  state.asked = 0;
  $("stop").disabled = true;
  $("preview").hidden = true;
  $("progress").value = 0;
  $("status").textContent = "";
  $("images").removeAttribute("aria-busy");
}

/** The newest stroke takes the place of what is under way; while it lasts, the next picture begins when one is done. */
function painted(ended, more = true) {
  $("undo").disabled = !painting.undone.length;
  state.stale ||= more;
  if (ended) state.strokeEnded = performance.now();
  if (!$("live").checked) return;
  if (state.stale && (ended || !state.asked)) draw();
  else if (ended && !state.asked) tellShown(state.strokeEnded); // its last picture came before it ended
}

function changed() {
  if (!$("live").checked || !state.model) return;
  const tab = state.tabs[state.condition];
  if (tab.source === "paint" || tab.image) draw(); // a tab that was only opened is no mistake
}

function typed() {
  clearTimeout(state.typing);
  state.typing = setTimeout(changed, 350);
}

// --- images from outside

function loadExample(first = false) {
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
  const limit = state.hello.limits.bytes;
  if (file.size > limit - 4096) {
    showError(`${file.name} has ${(file.size / 2 ** 20).toFixed(0)} MiB: give an image of less than ${Math.floor(limit / 2 ** 20)} MiB`);
    return;
  }
  const bytes = new Uint8Array(await file.arrayBuffer()), condition = state.condition;
  ask({ type: "read", model: state.model.id, condition }, [bytes], (record, parts) => {
    clearErrors();
    if (record.settings) {
      restore(record, parts, file.name);
    } else {
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
    }
  });
}

function restore(record, parts, name) {
  const settings = record.settings;
  setModel(settings.model);
  for (const [id, key] of [["prompt", "prompt"], ["negative", "negative_prompt"], ["steps", "steps"], ["guidance", "guidance"], ["scheduler", "scheduler"], ["seed", "seed"]]) {
    $(id).value = settings[key];
  }
  $("added").value = "";
  setCount(settings.images);
  setKept(settings.kept);
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
  $("notes").replaceChildren(...[`The settings of ${name} are restored.`, ...record.notes].map((note) => {
    const item = document.createElement("li");
    item.textContent = note;
    return item;
  }));
  document.body.dataset.restored = record.id;
  changed();
}

function setCount(n) {
  const box = document.querySelector(`input[name="count"][value="${n}"]`);
  if (box) {
    box.checked = true;
    return;
  }
  $("counts").append(choice("count", n, String(n), true)); // a picture of a larger request
}

function setKept(kept) {
  state.kept = kept;
  const words = Object.entries(kept).map(([key, value]) => (value === true ? key : `${key} ${value}`).replaceAll("_", " "));
  $("kept").hidden = !words.length;
  $("kept").firstElementChild.textContent = `Also from the picture: ${words.join(", ")}`;
}

// --- errors, where the eye is

function showError(said, field) {
  const name = Object.keys(WORDS).find((word) => said.startsWith(`${word} `));
  const message = name ? WORDS[name] + said.slice(name.length) : said;
  $("error").textContent = sentence(message);
  $("error").hidden = false;
  const input = $(FIELDS[field] ?? "");
  if (!input) return;
  input.setAttribute("aria-invalid", "true");
  const text = document.createElement("span");
  text.className = "wrong";
  text.id = `wrong-${input.id}`;
  text.textContent = sentence(message);
  input.setAttribute("aria-describedby", text.id);
  (input.closest(".pair") ?? input).after(text);
  const folded = input.closest("details");
  if (folded) folded.open = true;
}

function clearErrors() {
  $("error").hidden = true;
  $("error").textContent = "";
  document.querySelectorAll(".wrong").forEach((text) => text.remove());
  for (const input of document.querySelectorAll("[aria-invalid]")) {
    input.removeAttribute("aria-invalid");
    input.removeAttribute("aria-describedby");
  }
}

// --- small things

/** On a phone the picture is below the canvas: a small one follows the brush while the large one is out of sight. */
function showPeek() { $("peek").hidden = state.seen || !$("images").children.length; }

function sentence(text) { return text.charAt(0).toUpperCase() + text.slice(1); }

function number(id) { return $(id).value.trim() === "" ? null : Number($(id).value); }

function choice(name, value, title, checked) {
  const label = document.createElement("label"), input = document.createElement("input"), text = document.createElement("span");
  Object.assign(input, { type: "radio", name, value, checked });
  text.textContent = title;
  label.append(input, text);
  return label;
}

function showBrushes() {
  const brushes = state.model.brushes;
  $("brushes").replaceChildren(...brushes.map((brush, i) => {
    const button = document.createElement("button"), swatch = document.createElement("i"), name = document.createElement("span");
    button.type = "button";
    button.setAttribute("role", "radio");
    button.title = i < 9 ? `${brush.name} (${i + 1})` : brush.name;
    swatch.style.background = `rgb(${brush.color.join(" ")})`;
    name.textContent = brush.name;
    button.append(swatch, name);
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

function setWidth(value) {
  $("width").value = value;
  painting.diameter = Number($("width").value) * painting.w / 128; // as wide on the screen whatever the model's size
  $("width-shown").textContent = $("width").value;
  if (!$("ring").hidden) painting.showRing();
}

function setFilling(on) {
  painting.filling = on;
  $("fill").setAttribute("aria-pressed", on);
}

/** Arrow keys within a group of which one element has the focus. */
function rove(group, choose) {
  $(group).addEventListener("keydown", (event) => {
    const all = [...$(group).children], i = all.indexOf(document.activeElement);
    const to = { ArrowRight: i + 1, ArrowDown: i + 1, ArrowLeft: i - 1, ArrowUp: i - 1, Home: 0, End: all.length - 1 }[event.key];
    if (to === undefined || i < 0) return;
    event.preventDefault();
    const j = (to + all.length) % all.length;
    choose(j);
    $(group).children[j].focus();
  });
}

rove("tabs", (i) => { setCondition(state.model.conditions[i]); changed(); });
rove("brushes", setBrush);
$("canvas").addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (/^[1-9]$/.test(event.key)) setBrush(Number(event.key) - 1);
  else if (event.key === "[") setWidth(Number($("width").value) - 1);
  else if (event.key === "]") setWidth(Number($("width").value) + 1);
  else if (event.key === "f") setFilling(!painting.filling);
});
document.addEventListener("keydown", (event) => {
  const writes = /^(INPUT|TEXTAREA|SELECT)$/.test(event.target.tagName) && event.target.type !== "range";
  if (event.key === "Escape" && state.asked) $("stop").click();
  if ((event.ctrlKey || event.metaKey) && event.key === "z" && !writes && !$("paint").hidden) {
    event.preventDefault();
    painting.undo();
  }
  if ((event.ctrlKey || event.metaKey) && event.key === "Enter") draw();
});

$("model").onchange = () => { setModel($("model").value); changed(); };
for (const box of document.querySelectorAll('input[name="source"]')) {
  box.onchange = () => { state.tabs[state.condition].source = box.value; showTab(); changed(); };
}
for (const name of ["scale", "start", "end"]) {
  $(name).oninput = () => { state.tabs[state.condition][name] = number(name) ?? (name === "start" ? 0 : 1); showStrength(); typed(); };
}
$("pinned").onchange = () => { state.tabs[state.condition].pinned = $("pinned").checked; showStrength(); changed(); };
$("example").onclick = () => loadExample();
$("width").oninput = () => setWidth($("width").value);
$("fill").onclick = () => setFilling(!painting.filling);
$("undo").onclick = () => painting.undo();
$("clear").onclick = () => painting.clear();
$("generate").onclick = draw;
$("stop").onclick = () => {
  connection.send({ type: "stop" });
  finish(); // whatever still arrives is of no request that the page knows
  $("status").textContent = "stopped";
};
$("live").onchange = changed;
$("misses").onchange = showMisses;
$("settings").onsubmit = (event) => { event.preventDefault(); draw(); };
// A choice is made at once, a text letter by letter.
$("settings").oninput = (event) => { if (event.target.type === "radio" || event.target.tagName === "SELECT") changed(); else typed(); };
$("defaults").onclick = () => { const live = $("live").checked; useDefaults(); $("live").checked = live; changed(); };
$("forget").onclick = () => { setKept({}); changed(); };
$("dice").onclick = () => { $("seed").value = crypto.getRandomValues(new Uint32Array(1))[0]; changed(); };
$("choose").onclick = () => $("file").click();
$("file").onchange = () => { if ($("file").files[0]) loadFile($("file").files[0]); $("file").value = ""; };
$("paste").onclick = async () => {
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
};
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
const inSight = { pictures: 1, board: 1 };
const watch = new IntersectionObserver((all) => {
  for (const entry of all) inSight[entry.target.id] = entry.intersectionRatio;
  state.seen = inSight.pictures >= 0.4 || inSight.board < 0.4;
  showPeek();
}, { threshold: [0, 0.4] });
watch.observe($("pictures"));
watch.observe($("board"));
$("peek").onclick = () => $("output").scrollIntoView({ block: "start" });
setUpTheme($("theme"));

// For tests, which look at what is painted and not at what the canvas makes of it.
Object.assign(window, { painting, demoState: state });
