// Errors, where the eye is: on the picture, and beside the setting that is wrong.

import { $, sentence, wrap } from "./dom.js";

// Fields of a request, as errors name them, and where they are on the page.
const FIELDS = {
  num_inference_steps: "steps", guidance_scale: "guidance", seed: "seed", scheduler: "scheduler", prompt: "prompt",
  negative_prompt: "negative", controlnet_conditioning_scale: "scale", control_guidance_start: "start",
  control_guidance_end: "end", strength: "amount",
};

// What errors call them, and what the page does.
const WORDS = {
  num_inference_steps: "steps", guidance_scale: "guidance", negative_prompt: "negative prompt", "n, the images of a request,": "the number of images",
  num_images_per_prompt: "the number of images", controlnet_conditioning_scale: "scale", control_guidance_start: "start",
  control_guidance_end: "end", lcm: "LCM",
};

export function showError(said, field) {
  const name = Object.keys(WORDS).find((word) => said.startsWith(`${word} `));
  const message = sentence(name ? WORDS[name] + said.slice(name.length) : said);
  $("error").textContent = message;
  $("error").hidden = false;
  const input = $(FIELDS[field] ?? "");
  if (!input) return;
  input.setAttribute("aria-invalid", "true");
  const text = wrap("span", message);
  text.className = "wrong";
  text.id = `wrong-${input.id}`;
  input.setAttribute("aria-describedby", text.id);
  (input.closest(".pair") ?? input).after(text);
  const folded = input.closest("details");
  if (folded) folded.open = true;
}

export function clearErrors() {
  $("error").hidden = true;
  $("error").textContent = "";
  document.querySelectorAll(".wrong").forEach((text) => text.remove());
  for (const input of document.querySelectorAll("[aria-invalid]")) {
    input.removeAttribute("aria-invalid");
    input.removeAttribute("aria-describedby");
  }
}
