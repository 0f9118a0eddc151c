// What the page knows; its canvas, and how it asks the server.

import { $ } from "./dom.js";
import { showError } from "./errors.js";
import { Painting } from "./painting.js";

export const FEW_STEPS = 8; // a model of so few steps can follow a brush

export const state = {
  connection: null,
  hello: null, // what the server said first: models, conditions, schedulers, limits
  model: null,
  condition: null,
  tabs: {}, // of each condition: where it comes from, its image, how strongly
  begin: null, // the bytes of the image to begin with
  id: 0, // of the last message that asked for something
  asked: 0, // the last request for pictures; 0: none is under way
  sent: 0, // when, in milliseconds
  stale: false, // something was painted since it was sent
  strokeEnded: null, // when the last stroke ended, until its picture is shown
  kept: {}, // settings of a restored picture for which the page has no fields
  waiting: new Map(), // what is done with the answer to a message
  typing: 0,
  seen: true, // whether the pictures are in sight, or the canvas is not
};

export const painting = new Painting($("canvas"), $("ring"));

/** Sends a message; `then(record, parts)` gets its answer. */
export function ask(record, parts, then) {
  record.id = ++state.id;
  state.waiting.set(record.id, then);
  if (!state.connection.send(record, parts)) showError("the server cannot be reached: the page tries again by itself");
}

export function answered(record, parts) {
  const then = state.waiting.get(record.id);
  state.waiting.delete(record.id);
  then?.(record, parts);
}

/** The bytes of a file; null, and an error on the page, where it is too large. */
export async function bytesOf(file) {
  const limit = state.hello.limits.bytes;
  if (file.size > limit - 4096) {
    showError(`${file.name} has ${(file.size / 2 ** 20).toFixed(0)} MiB: give an image of less than ${Math.floor(limit / 2 ** 20)} MiB`);
    return null;
  }
  return new Uint8Array(await file.arrayBuffer());
}
