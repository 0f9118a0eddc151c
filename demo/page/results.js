// The pictures, the three rows, the seconds.

import { comparedImages, showCompared } from "./compare.js";
import { $, wrap } from "./dom.js";

const STAGES = ["#5b8def", "#e0883a", "#3aa76d", "#b061d8", "#d4504e", "#7b8794", "#c2a21c", "#2aa3b5"];
let urls = [];

/** The first picture that is shown: its file and its seed. */
export const shown = { bytes: null, seed: "" };

function pngUrl(bytes) {
  return URL.createObjectURL(new Blob([bytes], { type: "image/png" }));
}

/** Shows a finished request. Resolves once its pictures are decoded and in the document. */
export async function showResult(record, parts, titles, current) {
  const made = [];
  const picture = (number, alt, sharp) => {
    const image = new Image();
    image.src = pngUrl(parts[number]);
    made.push(image.src);
    image.alt = alt;
    image.draggable = false;
    if (sharp) image.className = "sharp";
    return image;
  };
  const images = record.images.map((number, i) => picture(number, `Picture of seed ${record.seeds[i]}`));
  const others = comparedImages(record, parts, picture);
  await Promise.all([...images, ...others].map((image) => image.decode()));
  if (!current()) {
    made.forEach((url) => URL.revokeObjectURL(url));
    return false;
  }
  $("images").replaceChildren(...images.map((image) => wrap("li", image)));
  $("images").className = images.length > 1 ? "many" : "";
  showCompared(record, others);
  Object.assign(shown, { bytes: parts[record.images[0]], seed: record.seeds[0] });
  $("peek").firstElementChild.src = images[0].src;
  $("empty").hidden = true;
  $("preview").hidden = true;
  rows(record, titles, picture);
  stages(record.timings);
  caption(record);
  $("notes").replaceChildren(...record.notes.map((note) => wrap("li", note)));
  const old = urls;
  urls = made;
  setTimeout(() => old.forEach((url) => URL.revokeObjectURL(url)), 1000);
  return true;
}

/** Small pictures of what is under way, over the finished ones. Noise hides what is large: the earlier, the more blur. */
export function showPreviews(contents, share) {
  const old = [...$("preview").querySelectorAll("img")].map((image) => image.src);
  $("preview").replaceChildren(...contents.map((bytes) => {
    const image = new Image();
    image.src = pngUrl(bytes);
    image.alt = "";
    image.style.filter = `blur(${(2 + 14 * (1 - share)).toFixed(1)}px)`;
    return wrap("li", image);
  }));
  $("preview").className = contents.length > 1 ? "many" : "";
  $("preview").hidden = false;
  $("empty").hidden = true;
  old.forEach((url) => URL.revokeObjectURL(url));
}

function rows(record, titles, picture) {
  const n = record.images.length, found = [];
  for (const control of record.controls) {
    const title = titles[control.condition];
    found.push(row("Condition", title, n, [figure(picture(control.given, `Condition: ${title}`, true), [])]));
  }
  const saved = record.images.map((number, i) => {
    const image = picture(number, `Picture of seed ${record.seeds[i]}`);
    const link = document.createElement("a");
    link.href = image.src;
    link.download = `cnpp-trt-${record.seeds[i]}.png`;
    link.textContent = "Save";
    return figure(image, [`seed ${record.seeds[i]} · `, link]);
  });
  found.push(row(n > 1 ? "Images" : "Image", "", n, saved));
  for (const control of record.controls) {
    const title = titles[control.condition];
    if (!control.extracted) {
      found.push(row("Extracted", `${title}: no extractor`, n, []));
      continue;
    }
    const cells = control.extracted.map((number, i) => {
      const score = control.scores[i];
      return figure(picture(number, `${title} extracted from the picture of seed ${record.seeds[i]}: ${score.text}`, true), scoreText(score));
    });
    found.push(row("Extracted", title, n, cells));
    const missed = row("Missed", title, n, control.extracted.map(() => figure(blank(), [])));
    missed.classList.add("missed");
    missed.hidden = !$("misses").checked;
    missed.render = () => mark(found, missed, control, record);
    missed.given = control.given;
    found.push(missed);
  }
  $("rows").style.setProperty("--n", n);
  $("rows").className = n === 1 ? "single" : ""; // one picture: its three images stand side by side
  $("rows").replaceChildren(...found);
  $("result").hidden = false;
  showMisses();
}

/** The rows that show where a condition was missed: made only where they are looked at. */
export function showMisses() {
  for (const section of document.querySelectorAll(".missed")) {
    section.hidden = !$("misses").checked;
    if (!section.hidden) section.render();
  }
}

async function mark(sections, missed, control, record) {
  const given = sections[record.controls.indexOf(control)].querySelector("img");
  const images = sections[sections.indexOf(missed) - 1].querySelectorAll("img");
  const wanted = await pixelsOf(given);
  for (const [i, canvas] of [...missed.querySelectorAll("canvas")].entries()) {
    const seen = await pixelsOf(images[i]);
    const w = canvas.width = wanted.width, h = canvas.height = wanted.height, out = new ImageData(w, h);
    let sum = 0;
    for (let at = 0; at < out.data.length; at += 4) {
      const off = Math.max(...[0, 1, 2].map((c) => Math.abs(wanted.data[at + c] - seen.data[at + c]))) / 255;
      const share = control.condition === "seg" ? Number(off > 0.02) : off;
      sum += share;
      const gray = 40 + 0.25 * wanted.data[at + 1];
      out.data.set([gray + (255 - gray) * share, gray * (1 - share) + 60 * share, gray * (1 - share) + 40 * share, 255], at);
    }
    canvas.getContext("2d").putImageData(out, 0, 0);
    const percent = (100 * sum / (w * h)).toFixed(1);
    canvas.setAttribute("aria-label", `Missed: ${percent} % of the picture`);
    canvas.parentElement.querySelector("figcaption").textContent = `${percent} %`;
  }
}

async function pixelsOf(image) {
  await image.decode();
  const canvas = document.createElement("canvas");
  canvas.width = image.naturalWidth;
  canvas.height = image.naturalHeight;
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(image, 0, 0);
  return context.getImageData(0, 0, canvas.width, canvas.height);
}

function stages(timings) {
  const parts = Object.entries(timings).filter(([name, seconds]) => name !== "total" && seconds >= 0.0005);
  const sum = parts.reduce((total, [, seconds]) => total + seconds, 0) || 1;
  const bar = document.createElement("div"), list = document.createElement("ul");
  bar.className = "bar";
  bar.setAttribute("aria-hidden", "true");
  parts.forEach(([name, seconds], i) => {
    const color = STAGES[i % STAGES.length], piece = document.createElement("span"), dot = document.createElement("i");
    piece.style.background = dot.style.background = color;
    piece.style.width = `${100 * seconds / sum}%`;
    bar.append(piece);
    list.append(wrap("li", dot, `${name.replaceAll("_", " ")} ${seconds.toFixed(3)} s`));
  });
  $("stages").replaceChildren(bar, list);
}

function caption(record) {
  const last = record.seeds.length > 1 ? ` to ${record.seeds.at(-1)}` : "";
  const pieces = [`seed ${record.seeds[0]}${last}`];
  for (const control of record.controls) {
    if (control.scores) pieces.push(" · ", ...scoreText(control.scores[0], true));
  }
  if (pieces.length === 1) pieces.push(" · no score: there is no condition that can be extracted again");
  $("caption").replaceChildren(...pieces);
}

function scoreText(score, strong = false) {
  const value = wrap(strong ? "b" : "span", score.text);
  if (!score.grade) return [value];
  const grade = wrap("span", score.grade);
  grade.className = score.grade === "weak" ? "grade low" : "grade";
  return [value, " · ", grade];
}

function row(title, detail, n, cells) {
  const section = document.createElement("section"), heading = wrap("h2", title);
  if (detail) heading.append(wrap("small", ` ${detail}`));
  section.append(heading, ...cells);
  return section;
}

function figure(content, pieces) {
  const made = document.createElement("figure"), text = document.createElement("figcaption");
  text.append(...pieces);
  made.append(content, text);
  return made;
}

function blank() {
  const canvas = document.createElement("canvas");
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", "Missed");
  return canvas;
}
