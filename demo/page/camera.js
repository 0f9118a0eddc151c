// A photo from the camera of the visitor's own machine. Frames leave it only once "Take" is pressed.

import { $ } from "./dom.js";
import { showError } from "./errors.js";

/** Shows what the camera sees until a photo is taken. Returns its bytes, or null where it was closed or there is none. */
export async function openCamera() {
  const dialog = $("camera-view"), video = $("camera-video");
  let stream;
  try {
    // Browsers give the camera to pages of this machine and of https alone: elsewhere there is no `mediaDevices`.
    stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
  } catch (error) {
    showError(navigator.mediaDevices
      ? `the camera cannot be used (${error.name}): allow it in the browser, or choose a file`
      : "the browser gives the camera to https and to this machine alone: open the page by 127.0.0.1, or choose a file");
    return null;
  }
  video.srcObject = stream;
  dialog.returnValue = "";
  $("camera-take").disabled = true; // there is no frame yet
  video.onplaying = () => { $("camera-take").disabled = false; };
  video.play().catch(() => {}); // it was closed before
  dialog.showModal();
  await new Promise((resolve) => { dialog.onclose = resolve; });
  const bytes = dialog.returnValue === "take" ? await frameOf(video) : null;
  stream.getTracks().forEach((track) => track.stop());
  video.srcObject = null;
  return bytes;
}

async function frameOf(video) {
  const canvas = document.createElement("canvas");
  canvas.width = video.videoWidth;
  canvas.height = video.videoHeight;
  canvas.getContext("2d").drawImage(video, 0, 0);
  const blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
  return new Uint8Array(await blob.arrayBuffer());
}
