// Two models' pictures of one request, one over the other: a slider moves the line between them.

import { $, wrap } from "./dom.js";

/** Lays the other model's pictures over the first one's. Returns the images that have to be decoded before. */
export function comparedImages(record, parts, picture) {
  return (record.compared?.images ?? []).map((part, i) => picture(part, `Picture of ${record.compared.model}, seed ${record.seeds[i]}`));
}

export function showCompared(record, images) {
  $("split-line").hidden = !images.length;
  if (!images.length) return;
  images.forEach((image, i) => {
    image.className = "other";
    $("images").children[i].append(image, wrap("i"));
  });
  const { model, seconds, controls } = record.compared;
  const told = (scores) => (scores?.length ? `, ${scores[0].text}` : "");
  $("split-left").textContent = record.model + told(record.controls.find((control) => control.scores)?.scores);
  $("split-right").textContent = `${model}${told(controls[0]?.scores)}, ${seconds.toFixed(2)} s`;
  move();
}

function move() {
  $("images").style.setProperty("--split", `${$("split").value}%`);
  $("split").setAttribute("aria-valuetext", `${$("split").value} % of the width shows the first model`);
}

export function setUpCompare() {
  $("split").oninput = move;
  // The line can also be drawn on the picture itself.
  $("pictures").addEventListener("pointermove", (event) => {
    const item = event.buttons === 1 && !$("split-line").hidden && event.target.closest("#images li");
    if (!item) return;
    const box = item.getBoundingClientRect();
    $("split").value = Math.round(100 * (event.clientX - box.left) / box.width);
    move();
  });
}
