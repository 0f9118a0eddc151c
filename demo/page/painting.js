// The canvas on which a segmentation is painted. What counts are the labels; the canvas shows them in the palette's
// colors and is never read back, so no pixel can be a mixture.

const UNDO = 40;

export class Painting {
  constructor(canvas, ring) {
    this.canvas = canvas;
    this.ring = ring;
    /** `onChange(ended, more)`: `more` was painted; a stroke, a fill or an undo has `ended`. */
    this.onChange = () => {};
    this.context = canvas.getContext("2d", { alpha: false });
    this.brush = 0;
    this.diameter = 10;
    this.filling = false;
    this.undone = [];
    this.stroke = null;
    this.cursor = null;
    this.colors = new Uint32Array(256);
    this.resize(128, 128);
    canvas.addEventListener("pointerdown", (event) => this.down(event));
    canvas.addEventListener("pointermove", (event) => this.move(event));
    canvas.addEventListener("pointerup", (event) => this.up(event));
    canvas.addEventListener("pointercancel", (event) => this.up(event));
    canvas.addEventListener("pointerleave", () => { if (!this.stroke) this.ring.hidden = true; });
    canvas.addEventListener("keydown", (event) => this.key(event));
    canvas.addEventListener("blur", () => { this.ring.hidden = true; });
  }

  /** The brushes: `{name, label, color}` of each. */
  setBrushes(brushes) {
    this.brushes = brushes;
    // Pixels of ImageData are bytes RGBA, whatever the order of bytes in a word is here.
    const bytes = new Uint8Array(this.colors.buffer);
    bytes.fill(0);
    for (let label = 0; label < 256; label++) bytes[4 * label + 3] = 255;
    for (const { label, color } of brushes) bytes.set(color, 4 * label);
  }

  /** Another size: what is painted is stretched to it. */
  resize(width, height) {
    const before = this.labels, w = this.w, h = this.h;
    if (before && w === width && h === height) return;
    this.w = this.canvas.width = width;
    this.h = this.canvas.height = height;
    this.image = this.context.createImageData(width, height);
    this.pixels = new Uint32Array(this.image.data.buffer);
    this.labels = new Uint8Array(width * height);
    this.undone = [];
    if (before) {
      for (let y = 0; y < height; y++) {
        for (let x = 0; x < width; x++) {
          this.labels[y * width + x] = before[Math.floor(y * h / height) * w + Math.floor(x * w / width)];
        }
      }
    }
    this.show();
  }

  /** Takes labels over, as Uint8Array of the size. */
  load(labels) {
    this.remember();
    this.labels.set(labels);
    this.show();
  }

  /** Sky above the middle, grass below. */
  clear() {
    this.remember();
    const lower = (this.brushes.find((brush) => brush.name === "grass") ?? this.brushes[0]).label;
    const upper = (this.brushes.find((brush) => brush.name === "sky") ?? this.brushes[0]).label;
    this.labels.fill(upper, 0, this.w * (this.h >> 1));
    this.labels.fill(lower, this.w * (this.h >> 1));
    this.show();
    this.onChange(true);
  }

  undo() {
    if (!this.undone.length) return;
    this.labels = this.undone.pop();
    this.show();
    this.onChange(true);
  }

  remember() {
    this.undone.push(this.labels.slice());
    if (this.undone.length > UNDO) this.undone.shift();
  }

  show() {
    for (let i = 0; i < this.labels.length; i++) this.pixels[i] = this.colors[this.labels[i]];
    this.context.putImageData(this.image, 0, 0);
  }

  /** [x, y] of an event in pixels of the painting. */
  place(event) {
    const box = this.canvas.getBoundingClientRect();
    return [(event.clientX - box.left) * this.w / box.width, (event.clientY - box.top) * this.h / box.height];
  }

  down(event) {
    if (event.button !== 0 || this.stroke) return;
    event.preventDefault();
    this.canvas.focus({ preventScroll: true });
    this.canvas.setPointerCapture(event.pointerId);
    this.remember();
    const at = this.cursor = this.place(event);
    if (this.filling) {
      this.flood(...at);
      this.onChange(true);
      return;
    }
    this.stroke = { id: event.pointerId, at };
    this.line(at, at);
    this.onChange(false);
  }

  move(event) {
    this.cursor = this.place(event);
    this.showRing();
    if (!this.stroke || event.pointerId !== this.stroke.id) return;
    for (const each of event.getCoalescedEvents?.() ?? [event]) {
      const to = this.place(each);
      this.line(this.stroke.at, to);
      this.stroke.at = to;
    }
    this.onChange(false);
  }

  up(event) {
    if (!this.stroke || event.pointerId !== this.stroke.id) return;
    this.stroke = null;
    this.onChange(true, false);
  }

  showRing() {
    if (!this.cursor) return;
    const box = this.canvas.getBoundingClientRect(), size = this.filling ? 6 : this.diameter;
    this.ring.hidden = false;
    this.ring.style.width = this.ring.style.height = `${Math.max(6, size * box.width / this.w)}px`;
    this.ring.style.left = `${this.cursor[0] * box.width / this.w}px`;
    this.ring.style.top = `${this.cursor[1] * box.height / this.h}px`;
  }

  /** A round brush along a line: each pixel whose center lies within the radius gets the label, whole. */
  line([x0, y0], [x1, y1]) {
    const r = Math.max(this.diameter / 2, 0.71), label = this.brush;
    const dx = x1 - x0, dy = y1 - y0, length = dx * dx + dy * dy;
    const left = Math.max(0, Math.floor(Math.min(x0, x1) - r)), right = Math.min(this.w - 1, Math.ceil(Math.max(x0, x1) + r));
    const top = Math.max(0, Math.floor(Math.min(y0, y1) - r)), low = Math.min(this.h - 1, Math.ceil(Math.max(y0, y1) + r));
    for (let y = top; y <= low; y++) {
      for (let x = left; x <= right; x++) {
        const px = x + 0.5 - x0, py = y + 0.5 - y0;
        const t = length ? Math.max(0, Math.min(1, (px * dx + py * dy) / length)) : 0;
        const ex = px - t * dx, ey = py - t * dy;
        if (ex * ex + ey * ey <= r * r) {
          this.labels[y * this.w + x] = label;
          this.pixels[y * this.w + x] = this.colors[label];
        }
      }
    }
    if (right >= left && low >= top) this.context.putImageData(this.image, 0, 0, left, top, right - left + 1, low - top + 1);
  }

  flood(x, y) {
    const w = this.w, h = this.h, labels = this.labels;
    const start = Math.min(h - 1, Math.max(0, Math.floor(y))) * w + Math.min(w - 1, Math.max(0, Math.floor(x)));
    const from = labels[start], to = this.brush;
    if (from === to) return;
    const open = [start];
    labels[start] = to;
    while (open.length) {
      const i = open.pop(), column = i % w;
      for (const j of [column > 0 ? i - 1 : -1, column < w - 1 ? i + 1 : -1, i - w, i + w]) {
        if (j >= 0 && j < labels.length && labels[j] === from) {
          labels[j] = to;
          open.push(j);
        }
      }
    }
    this.show();
  }

  key(event) {
    const step = (event.shiftKey ? 8 : 2) * this.w / 128;
    const moves = { ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step], ArrowDown: [0, step] };
    if (moves[event.key]) {
      const [x, y] = this.cursor ?? [this.w / 2, this.h / 2];
      const [dx, dy] = moves[event.key];
      this.cursor = [Math.min(this.w, Math.max(0, x + dx)), Math.min(this.h, Math.max(0, y + dy))];
      this.showRing();
    } else if (event.key === " ") {
      this.cursor ??= [this.w / 2, this.h / 2];
      this.remember();
      if (this.filling) this.flood(...this.cursor);
      else this.line(this.cursor, this.cursor);
      this.showRing();
      this.onChange(true);
    } else {
      return;
    }
    event.preventDefault();
  }
}
