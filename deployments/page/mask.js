// Painting a mask over a picture, with the pointer, or with the arrow keys and the space bar. White is repainted, black
// is kept.

import { button, find, imageOf, make } from "./dom.js";

const TINT = "#e0218a";

/**
 * Open the dialog for painting a mask.
 * @param picture the blob of the picture below the mask
 * @param before the mask to begin with, or null
 * @returns the mask as a PNG of the picture's size; `before` if it was cancelled, null if nothing is painted
 */
export async function paint(picture, before) {
  const dialog = find("mask-dialog");
  const bitmap = await createImageBitmap(picture);
  const canvas = make("canvas", { width: bitmap.width, height: bitmap.height, tabIndex: 0 });
  canvas.setAttribute("role", "application");
  canvas.setAttribute("aria-label", "Mask: arrow keys move the brush, space paints, Z takes a stroke back");
  const brush = new Brush(canvas);
  if (before) brush.load(await createImageBitmap(before));

  const size = make("input", { type: "range", min: 1, max: 40, value: 12 });
  const erase = make("input", { type: "checkbox" });
  size.oninput = () => brush.resize(Number(size.value));
  erase.onchange = () => (brush.erasing = erase.checked);
  brush.resize(Number(size.value));
  find("mask-tools").replaceChildren(
    make("label", { className: "inline" }, "Brush", size),
    make("label", { className: "switch" }, erase, "Erase"),
    button("Undo", () => brush.undo()),
    button("Clear", () => brush.clear()),
  );
  find("canvas").replaceChildren(imageOf(picture, ""), canvas, brush.ring);
  // The picture is as large as the window allows. The canvas lies over it and scales with it.
  const room = Math.min(innerWidth * 0.86 / bitmap.width, innerHeight * 0.6 / bitmap.height);
  find("canvas").style.width = `${Math.round(bitmap.width * Math.min(room, 4))}px`;
  dialog.returnValue = "";
  dialog.showModal();
  canvas.focus();
  find("mask-done").onclick = () => dialog.close("done");
  await new Promise((resolve) => dialog.addEventListener("close", resolve, { once: true }));
  return dialog.returnValue === "done" ? brush.mask() : before;
}

class Brush {
  erasing = false;
  #canvas;
  #context;
  #radius = 10;
  #at;
  #undone = [];

  constructor(canvas) {
    this.#canvas = canvas;
    this.#context = canvas.getContext("2d", { willReadFrequently: true });
    this.#at = [canvas.width / 2, canvas.height / 2];
    this.ring = make("span", { className: "ring" });
    canvas.onpointerdown = (event) => {
      canvas.setPointerCapture(event.pointerId);
      this.#remember();
      this.#stroke(this.#point(event));
    };
    canvas.onpointermove = (event) => {
      const point = this.#point(event);
      if (event.buttons & 1) this.#stroke(point, this.#at);
      this.#move(point);
    };
    canvas.onkeydown = (event) => this.#key(event);
  }

  /** The brush's radius, in hundredths of the picture's longer side. */
  resize(share) {
    this.#radius = (Math.max(this.#canvas.width, this.#canvas.height) * share) / 200;
    this.#move(this.#at);
  }

  clear() {
    this.#remember();
    this.#context.clearRect(0, 0, this.#canvas.width, this.#canvas.height);
  }

  undo() {
    const last = this.#undone.pop();
    if (last) this.#context.putImageData(last, 0, 0);
  }

  /** Load a mask: its white parts become painted. */
  load(bitmap) {
    const { width, height } = this.#canvas;
    this.#context.drawImage(bitmap, 0, 0, width, height);
    const pixels = this.#context.getImageData(0, 0, width, height);
    const tint = [1, 3, 5].map((digit) => parseInt(TINT.slice(digit, digit + 2), 16));
    for (let i = 0; i < pixels.data.length; i += 4) pixels.data.set([...tint, pixels.data[i]], i);
    this.#context.putImageData(pixels, 0, 0);
  }

  /** The painted mask, white on black; null if nothing is painted. */
  async mask() {
    const { width, height } = this.#canvas;
    const { data } = this.#context.getImageData(0, 0, width, height);
    if (!data.some((value, i) => i % 4 === 3 && value > 127)) return null;
    const drawn = make("canvas", { width, height });
    const context = drawn.getContext("2d");
    context.drawImage(this.#canvas, 0, 0);
    for (const [operation, colour] of [["source-in", "#fff"], ["destination-over", "#000"]]) {
      context.globalCompositeOperation = operation;
      context.fillStyle = colour;
      context.fillRect(0, 0, width, height);
    }
    return new Promise((resolve) => drawn.toBlob(resolve, "image/png"));
  }

  #remember() {
    const { width, height } = this.#canvas;
    this.#undone = [...this.#undone.slice(-9), this.#context.getImageData(0, 0, width, height)];
  }

  #point(event) {
    const box = this.#canvas.getBoundingClientRect();
    const { width, height } = this.#canvas;
    return [((event.clientX - box.left) / box.width) * width, ((event.clientY - box.top) / box.height) * height];
  }

  #stroke(to, from = to) {
    Object.assign(this.#context, { lineWidth: this.#radius * 2, lineCap: "round", strokeStyle: TINT });
    this.#context.globalCompositeOperation = this.erasing ? "destination-out" : "source-over";
    this.#context.beginPath();
    this.#context.moveTo(...from);
    this.#context.lineTo(...to);
    this.#context.stroke();
    this.#context.globalCompositeOperation = "source-over";
    this.#move(to);
  }

  #move(to) {
    this.#at = to;
    const { width, height } = this.#canvas;
    const style = this.ring.style;
    style.left = `${((to[0] - this.#radius) / width) * 100}%`;
    style.top = `${((to[1] - this.#radius) / height) * 100}%`;
    style.width = `${((this.#radius * 2) / width) * 100}%`;
  }

  #key(event) {
    const [x, y] = this.#at;
    const by = Math.max(1, this.#radius / 2);
    const moves = { ArrowLeft: [-by, 0], ArrowRight: [by, 0], ArrowUp: [0, -by], ArrowDown: [0, by] };
    if (event.key in moves) {
      const [dx, dy] = moves[event.key];
      const inside = (value, end) => Math.min(Math.max(value, 0), end);
      this.#move([inside(x + dx, this.#canvas.width), inside(y + dy, this.#canvas.height)]);
    } else if (event.key === " ") {
      this.#remember();
      this.#stroke(this.#at);
    } else if (event.key === "z") this.undo();
    else return;
    event.preventDefault();
  }
}
