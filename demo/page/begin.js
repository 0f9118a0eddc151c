// Image-to-image: the picture begins with an image instead of noise alone.

import { $ } from "./dom.js";
import { changed } from "./drawing.js";
import { showError } from "./errors.js";
import { shown } from "./results.js";
import { bytesOf, state } from "./state.js";

/** Takes the bytes of an image file to begin with, or none. */
export function setBegin(bytes, name) {
  if ($("begin-image").src) URL.revokeObjectURL($("begin-image").src);
  state.begin = bytes ?? null;
  $("begin-image").hidden = $("begin-remove").hidden = !bytes;
  $("begin-name").textContent = bytes ? name : "";
  $("begin-shown").textContent = bytes ? `: ${name}` : "";
  if (!bytes) {
    $("begin-image").removeAttribute("src");
    return;
  }
  $("begin-image").src = URL.createObjectURL(new Blob([bytes]));
  $("begin-image").alt = `The image to begin with: ${name}`;
  $("begin").open = true;
}

export function setUpBegin() {
  $("begin-choose").onclick = () => $("begin-file").click();
  $("begin-file").onchange = async () => {
    const file = $("begin-file").files[0], bytes = file && (await bytesOf(file));
    $("begin-file").value = "";
    if (!bytes) return;
    setBegin(bytes, file.name);
    changed();
  };
  $("begin-drawn").onclick = () => {
    if (!shown.bytes) {
      showError("there is no picture yet: draw one first");
      return;
    }
    setBegin(shown.bytes, `picture of seed ${shown.seed}`);
    changed();
  };
  $("begin-remove").onclick = () => { setBegin(null); changed(); };
}
