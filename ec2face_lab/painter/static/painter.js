// Draw a face: the canvas and the controls of `ec2face_lab.painter.widget.MaskPainter`.
//
// A label map is a Uint8Array of class ids, row by row. Every tool writes whole pixels of one class
// into it (Bresenham lines of disks, flood fill); nothing is painted by the canvas, whose strokes
// would blend neighbouring classes. Canvases only show the array.

// ------------------------------------------------------------------ exact painting, without a page

/** Pixels of a brush around its centre; `size` is the diameter. */
export function disk(size) {
  const shift = size % 2 ? 0 : 0.5; // an even brush is centred between pixels
  const reach = Math.ceil(size / 2);
  const offsets = [];
  for (let dy = -reach; dy <= reach; dy++)
    for (let dx = -reach; dx <= reach; dx++)
      if ((dx - shift) ** 2 + (dy - shift) ** 2 <= (size / 2) ** 2) offsets.push([dx, dy]);
  return offsets;
}

/** Pixels of a straight line, both ends included (Bresenham). */
export function line(x0, y0, x1, y1) {
  const points = [];
  const dx = Math.abs(x1 - x0);
  const dy = -Math.abs(y1 - y0);
  const sx = Math.sign(x1 - x0);
  const sy = Math.sign(y1 - y0);
  let error = dx + dy;
  for (;;) {
    points.push([x0, y0]);
    if (x0 === x1 && y0 === y1) return points;
    const twice = 2 * error;
    if (twice >= dy) (error += dy), (x0 += sx);
    if (twice <= dx) (error += dx), (y0 += sy);
  }
}

/** A label map with its history; every change can be undone. */
export class LabelMap {
  constructor(width, height, ids, opposite) {
    this.width = width;
    this.height = height;
    this.ids = Uint8Array.from(ids);
    this.opposite = opposite; // class id -> the class of the other side
    this.axis = (width - 1) / 2; // column that mirrors: 2 * axis is a whole number
    this.past = [];
    this.future = [];
    this.before = null;
  }

  at(x, y) {
    const inside = x >= 0 && y >= 0 && x < this.width && y < this.height;
    return inside ? this.ids[y * this.width + x] : -1;
  }

  set(x, y, id) {
    if (this.at(x, y) >= 0) this.ids[y * this.width + x] = id;
  }

  /** Paint pixels; mirrored ones get the class of the other side and yield where both meet. */
  paint(pixels, id, mirror) {
    if (mirror) for (const [x, y] of pixels) this.set(2 * this.axis - x, y, this.opposite[id]);
    for (const [x, y] of pixels) this.set(x, y, id);
  }

  /** The pixels of a brush that moves along points. */
  static stroke(points, size) {
    const brush = disk(size);
    return points.flatMap(([x, y]) => brush.map(([dx, dy]) => [x + dx, y + dy]));
  }

  /** The connected area of one class around a pixel (four neighbours). */
  area(x, y) {
    const old = this.at(x, y);
    const found = [];
    if (old < 0) return found;
    const seen = new Uint8Array(this.ids.length);
    const open = [[x, y]];
    while (open.length) {
      const [px, py] = open.pop();
      if (this.at(px, py) !== old || seen[py * this.width + px]) continue;
      seen[py * this.width + px] = 1;
      found.push([px, py]);
      open.push([px + 1, py], [px - 1, py], [px, py + 1], [px, py - 1]);
    }
    return found;
  }

  fill(x, y, id, mirror) {
    const here = this.area(x, y);
    const there = mirror ? this.area(2 * this.axis - x, y) : [];
    this.paint(there, this.opposite[id], false);
    this.paint(here, id, false);
  }

  begin() {
    this.before = this.ids.slice();
  }

  cancel() {
    if (this.before) this.ids = this.before;
    this.before = null;
  }

  /** Keep what was painted since `begin` as one step; false if nothing changed. */
  commit() {
    const index = [];
    const before = this.before ?? this.ids;
    this.before = null;
    for (let i = 0; i < before.length; i++) if (before[i] !== this.ids[i]) index.push(i);
    if (!index.length) return false;
    const old = Uint8Array.from(index, (i) => before[i]);
    const now = Uint8Array.from(index, (i) => this.ids[i]);
    this.past.push({ index: Uint32Array.from(index), old, now });
    this.future = [];
    return true;
  }

  replace(ids) {
    this.begin();
    this.ids = Uint8Array.from(ids);
    return this.commit();
  }

  /** Undo, or redo, one step; false if there is none. */
  step(back) {
    const change = (back ? this.past : this.future).pop();
    if (!change) return false;
    change.index.forEach((place, i) => (this.ids[place] = (back ? change.old : change.now)[i]));
    (back ? this.future : this.past).push(change);
    return true;
  }
}

// -------------------------------------------------------------------------------------- the page

const TOOLS = { brush: "b", line: "l", fill: "f", eraser: "e", pick: "i" }; // with their keys
const SETTINGS = { seed: 1, text_scale: 0.5, mask_scale: 0.5, strength: 0.1 }; // with their steps
const STARTS = {
  empty: "an empty head",
  dataset: "a face of the data set",
  procedural: "a procedural face by caption",
  nearest: "the nearest mask by caption",
};
const ARROWS = { arrowleft: [-1, 0], arrowright: [1, 0], arrowup: [0, -1], arrowdown: [0, 1] };
const BACKGROUND = 0;
const LARGEST = 64; // brush
const IMAGES = ["photo", "picture"];

/** An element with properties, listeners (on...) and children. */
function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name in element && name !== "list") element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

const span = (name, textContent = "") => make("span", { className: `ec2-${name}`, textContent });

const packed = ({ colour: [r, g, b] }) => 0xff000000 + (b << 16) + (g << 8) + r; // as canvases do

const bytes = (view) => new Uint8Array(view.buffer, view.byteOffset, view.byteLength);

class Painter {
  constructor(model, el) {
    this.model = model;
    this.classes = model.get("_classes");
    this.colours = this.classes.map(packed);
    const [height, width] = model.get("_shape");
    const opposite = this.classes.map((c) => c.opposite);
    this.map = new LabelMap(width, height, bytes(model.get("mask")), opposite);
    this.tool = "brush";
    this.class = 1;
    this.size = Math.max(1, Math.round(width / 32));
    this.cursor = null; // pixel under the pointer, or of the arrow keys
    this.start = null; // pixel where a line or stroke began
    this.urls = new Map();
    this.off = [];
    el.append(this.#page());
    this.#listen();
    this.#select(1);
    this.#choose("brush");
    this.#showAll();
    model.send({ type: "ready" });
  }

  #page() {
    const { width, height } = this.map;
    const button = (text, act, title = "") =>
      make("button", { type: "button", textContent: text, title, onclick: act });
    this.tools = Object.entries(TOOLS).map(([name, key]) =>
      button(name, () => this.#choose(name), `${name} (${key})`));
    this.sizeInput = make("input", {
      type: "range", min: 1, max: Math.min(LARGEST, width >> 1), value: this.size,
      "aria-label": "brush size", oninput: () => this.#resize(+this.sizeInput.value),
    });
    this.sizeText = span("size");
    this.mirrorInput = make("input", { type: "checkbox", onchange: () => this.#showOverlay() });
    this.undoButton = button("undo", () => this.#history(true), "Ctrl+Z");
    this.redoButton = button("redo", () => this.#history(false), "Ctrl+Shift+Z, Ctrl+Y");
    const stamps = this.model.get("_stamps").map((name) =>
      button(name, () => this.model.send({ type: "stamp", name }), `add: ${name}`));
    const toolbar = make("div", { className: "ec2-row" }, ...this.tools,
      make("label", { title: "brush size ([ and ])" }, "size", this.sizeInput, this.sizeText),
      make("label", { title: "mirror left and right (m)" }, this.mirrorInput, "mirror"),
      this.undoButton, this.redoButton, "add:", ...stamps);

    this.rows = this.classes.map((c) => {
      const swatch = span("swatch");
      swatch.style.background = `rgb(${c.colour})`;
      return make("button", {
        type: "button", className: "ec2-class", title: `${c.name}: key ${c.key}`,
        onclick: () => this.#select(c.id),
      }, swatch, span("name", c.name), make("kbd", { textContent: c.key }), span("number"),
      span("number"));
    });
    const head = make("div", { className: "ec2-class ec2-head" }, span("swatch"),
      span("name", "class"), span("key"), span("number", "recall"), span("number", "F1"));
    const palette = make("div", { className: "ec2-palette" }, head, ...this.rows);

    this.photo = make("img", { className: "ec2-photo", alt: "", draggable: false });
    this.canvas = make("canvas", { className: "ec2-mask", width, height });
    this.overlay = make("canvas", {
      className: "ec2-overlay", width, height, tabIndex: 0, role: "application",
      "aria-label": "mask: arrow keys move, space paints",
    });
    const stage = make("div", { className: "ec2-stage" }, this.photo, this.canvas, this.overlay);
    stage.style.aspectRatio = `${width} / ${height}`;
    this.place = make("div", { className: "ec2-place", textContent: " " });
    this.opacity = this.#bound("range", "photo_opacity", { min: 0, max: 1, step: 0.05 });
    this.opacityRow = make("label", {}, "photo", this.opacity);

    this.picture = make("img", { className: "ec2-picture", alt: "the generated picture" });
    this.reading = make("canvas", { className: "ec2-reading", width, height });
    const draw = button("Draw", () => this.model.send({ type: "draw" }), "draw at rest (d)");
    draw.className = "ec2-draw";
    const live = this.#bound("checkbox", "live");
    this.keep = this.#bound("checkbox", "keep");
    this.keepRow = make("label", { title: "sample only where the mask was changed" }, this.keep,
      "keep the rest of the photo");
    const figure = (image, text) => make("figure", {}, image, make("figcaption", {}, text));
    this.results = make("div", { className: "ec2-results" },
      figure(this.picture, "picture"), figure(this.reading, "what the parser reads"),
      make("div", { className: "ec2-row" }, draw, make("label", {}, live, "at every pen-up")),
      this.keepRow);

    const caption = this.#bound("text", "caption", { placeholder: "caption" });
    const numbers = Object.entries(SETTINGS).map(([name, step]) =>
      make("label", {}, name.replace("_", " "), this.#bound("number", name, { step, min: 0 })));
    this.settings = make("div", { className: "ec2-row" }, caption, ...numbers);

    this.startSelect = make("select", { "aria-label": "start from" },
      ...this.model.get("_starts").map((kind) =>
        make("option", { value: kind, textContent: STARTS[kind] })));
    const ask = (text, message) => button(text, () => this.model.send(message()));
    const files = make("div", { className: "ec2-row" }, this.startSelect,
      ask("Start", () => ({ type: "start", kind: this.startSelect.value })),
      this.#file("Photo…", "photo", ".png,.jpg,.jpeg,.webp"),
      this.#file("Open mask…", "open", ".png"),
      ask("Save mask", () => ({ type: "save", what: "mask" })),
      ask("Save picture", () => ({ type: "save", what: "picture" })));

    this.status = make("div", { className: "ec2-status", role: "status" });
    this.strip = make("div", { className: "ec2-strip" });
    this.root = make("div", {
      className: "ec2-painter", "data-lm-suppress-shortcuts": "true", // JupyterLab's own keys
      onkeydown: (event) => this.#key(event),
    }, toolbar,
    make("div", { className: "ec2-main" }, palette,
      make("div", {}, stage, make("div", { className: "ec2-row" }, this.place, this.opacityRow)),
      this.results),
    this.settings, files, this.status, this.strip);
    return this.root;
  }

  /** An input that shows a trait and sets it. */
  #bound(type, name, more = {}) {
    const check = type === "checkbox";
    const input = make("input", { type, ...more, "data-trait": name });
    const show = () => (input[check ? "checked" : "value"] = this.model.get(name));
    input.addEventListener(type === "range" ? "input" : "change", () => {
      const value = check ? input.checked : type === "text" ? input.value : Number(input.value);
      this.model.set(name, value);
      this.model.save_changes();
    });
    this.#on(`change:${name}`, show);
    show();
    return input;
  }

  /** A button that sends a file's content to Python. */
  #file(text, type, accept) {
    const input = make("input", { type: "file", accept, hidden: true, "data-file": type });
    input.addEventListener("change", async () => {
      const [file] = input.files;
      if (file) this.model.send({ type, name: file.name }, undefined, [await file.arrayBuffer()]);
      input.value = ""; // the same file may be chosen again
    });
    const choose = () => input.click();
    return make("span", {}, input, make("button", { type: "button", onclick: choose }, text));
  }

  #on(event, act) {
    this.model.on(event, act);
    this.off.push(() => this.model.off(event, act));
  }

  #listen() {
    const stage = this.overlay;
    stage.addEventListener("pointerdown", (event) => {
      if (event.button > 0 && event.button !== 2) return;
      event.preventDefault();
      stage.focus();
      stage.setPointerCapture(event.pointerId);
      const pick = event.button === 2 || event.altKey;
      this.#press(this.#pixel(event), pick ? "pick" : this.tool);
    });
    stage.addEventListener("pointermove", (event) => {
      const moves = event.getCoalescedEvents?.() ?? [];
      for (const move of moves.length ? moves : [event]) this.#move(this.#pixel(move));
      this.#showOverlay();
    });
    stage.addEventListener("pointerup", () => this.#release());
    stage.addEventListener("pointercancel", () => this.#cancel());
    stage.addEventListener("pointerleave", () => {
      if (!this.start) (this.cursor = null), this.#showOverlay();
    });
    stage.addEventListener("contextmenu", (event) => event.preventDefault());
    this.#on("change:mask", () => {
      const ids = bytes(this.model.get("mask"));
      const same = ids.every((id, i) => id === this.map.ids[i]);
      if (same) return;
      this.#cancel();
      if (this.map.replace(ids)) this.#showMask();
    });
    for (const name of IMAGES) this.#on(`change:${name}`, () => this.#showImage(name));
    this.#on("change:photo_opacity", () => this.#showOpacity());
    this.#on("change:reading", () => this.#showReading());
    this.#on("change:agreement", () => this.#showAgreement());
    this.#on("change:status", () => this.#showStatus());
    this.#on("change:busy", () => this.#showStatus());
    this.#on("change:strip", () => this.#showStrip());
    this.#on("msg:custom", (message, buffers) => {
      if (message.type === "file") this.#download(message.name, buffers[0]);
    });
  }

  // ------------------------------------------------------------------------------------ painting

  #pixel(event) {
    const box = this.overlay.getBoundingClientRect();
    const x = Math.floor(((event.clientX - box.left) / box.width) * this.map.width);
    const y = Math.floor(((event.clientY - box.top) / box.height) * this.map.height);
    return [x, y];
  }

  #press([x, y], tool) {
    this.cursor = [x, y];
    if (tool === "pick") {
      if (this.map.at(x, y) >= 0) this.#select(this.map.at(x, y));
      return;
    }
    this.active = tool;
    this.start = [x, y];
    this.map.begin();
    if (tool === "fill") this.map.fill(x, y, this.class, this.mirror);
    else this.#strokeTo(x, y);
    this.#showMask();
  }

  #move([x, y]) {
    this.cursor = [x, y];
    if (!this.start || this.active === "fill") return;
    this.#strokeTo(x, y);
    this.#showMask();
  }

  #strokeTo(x, y) {
    const points = line(...this.start, x, y);
    if (this.active === "line") this.map.ids.set(this.map.before); // from the start anew
    else this.start = [x, y];
    const id = this.active === "eraser" ? BACKGROUND : this.class;
    this.map.paint(LabelMap.stroke(points, this.size), id, this.mirror);
  }

  #release() {
    if (!this.start) return;
    this.start = null;
    if (this.map.commit()) this.#changed();
    this.#showOverlay();
  }

  #cancel() {
    if (!this.start) return;
    this.start = null;
    this.map.cancel();
    this.#showMask();
  }

  #history(back) {
    this.#cancel();
    if (this.map.step(back)) this.#changed();
  }

  /** The user changed the mask: show it, tell Python, draw. */
  #changed() {
    this.#showMask();
    this.model.set("mask", new DataView(this.map.ids.slice().buffer));
    this.model.save_changes();
    if (this.model.get("live")) this.model.send({ type: "draw", live: true });
  }

  // ------------------------------------------------------------------------------------ keyboard

  #key(event) {
    const typing = event.target.matches("input:not([type=checkbox], [type=range]), select");
    if (typing || !this.#handle(event)) return;
    event.preventDefault();
    event.stopPropagation();
  }

  #handle(event) {
    const key = event.key.toLowerCase();
    if (event.ctrlKey || event.metaKey) {
      if (key !== "z" && key !== "y") return false;
      this.#history(key === "z" && !event.shiftKey);
      return true;
    }
    if (event.altKey) return false;
    const tool = Object.keys(TOOLS).find((name) => TOOLS[name] === key);
    const chosen = this.classes.find((c) => c.key === key);
    const move = ARROWS[key];
    if (tool) this.#choose(tool);
    else if (chosen) this.#select(chosen.id);
    else if (key === "m") this.mirrorInput.click();
    else if (key === "[") this.#resize(this.size - 1);
    else if (key === "]") this.#resize(this.size + 1);
    else if (key === "escape" && this.start) this.#cancel();
    else if (key === "d") this.model.send({ type: "draw" });
    else if (event.target !== this.overlay) return false;
    else if (move) this.#step(move, event.shiftKey ? 8 : 1);
    else if (key === " ") this.#toggle(event.repeat);
    else return false;
    return true;
  }

  #step([dx, dy], by) {
    const { width, height } = this.map;
    const [x, y] = this.cursor ?? [width >> 1, height >> 1];
    const clip = (value, end) => Math.min(Math.max(value, 0), end - 1);
    this.#move([clip(x + by * dx, width), clip(y + by * dy, height)]);
    this.#showOverlay();
  }

  /** Space sets the pen down and lifts it; fill and pick act at once. */
  #toggle(repeated) {
    if (repeated) return;
    if (this.start) return this.#release();
    this.#press(this.cursor ?? [this.map.width >> 1, this.map.height >> 1], this.tool);
    if (this.active === "fill") this.#release();
  }

  #choose(name) {
    this.tool = name;
    this.tools.forEach((b) => b.setAttribute("aria-pressed", b.textContent === name));
  }

  #select(id) {
    this.class = id;
    this.rows.forEach((row, i) => row.setAttribute("aria-pressed", i === id));
    if (this.tool === "eraser" || this.tool === "pick") this.#choose("brush");
  }

  #resize(size) {
    this.size = Math.min(Math.max(size, 1), +this.sizeInput.max);
    this.sizeInput.value = this.size;
    this.sizeText.textContent = this.size;
    this.#showOverlay();
  }

  get mirror() {
    return this.mirrorInput.checked;
  }

  // ------------------------------------------------------------------------------------- showing

  #showAll() {
    this.#resize(this.size);
    this.#showMask();
    IMAGES.forEach((name) => this.#showImage(name));
    this.#showReading();
    this.#showAgreement();
    this.#showStatus();
    this.#showStrip();
    this.results.hidden = this.settings.hidden = !this.model.get("_draws");
  }

  #paint(canvas, ids) {
    const context = canvas.getContext("2d");
    const image = context.createImageData(this.map.width, this.map.height);
    const pixels = new Uint32Array(image.data.buffer);
    ids.forEach((id, i) => (pixels[i] = this.colours[id]));
    context.putImageData(image, 0, 0);
  }

  #showMask() {
    this.#paint(this.canvas, this.map.ids);
    this.undoButton.disabled = !this.map.past.length;
    this.redoButton.disabled = !this.map.future.length;
  }

  /** The pixels that the tool would paint, and the mirror's axis. */
  #showOverlay() {
    const context = this.overlay.getContext("2d");
    const { width, height, axis } = this.map;
    context.clearRect(0, 0, width, height);
    context.fillStyle = "rgba(255, 255, 255, 0.55)";
    const columns = 1 + Math.ceil(axis) - Math.floor(axis);
    for (let y = 0; this.mirror && y < height; y += 4)
      context.fillRect(Math.floor(axis), y, columns, 1);
    if (!this.cursor) return void (this.place.textContent = " ");
    const [x, y] = this.cursor;
    const wide = this.tool === "fill" || this.tool === "pick" ? 1 : this.size;
    for (const [dx, dy] of disk(wide)) context.fillRect(x + dx, y + dy, 1, 1);
    const id = this.map.at(x, y);
    this.place.textContent = id < 0 ? " " : `${x}, ${y}: ${this.classes[id].name}`;
  }

  #url(name, view) {
    URL.revokeObjectURL(this.urls.get(name));
    const url = URL.createObjectURL(new Blob([bytes(view)], { type: "image/png" }));
    this.urls.set(name, url);
    return url;
  }

  #showImage(name) {
    const view = this.model.get(name);
    const there = Boolean(view?.byteLength);
    const image = this[name];
    image.style.visibility = there ? "visible" : "hidden";
    if (there) image.src = this.#url(name, view);
    else image.removeAttribute("src");
    if (name !== "photo") return;
    this.opacityRow.hidden = this.keepRow.hidden = !there;
    this.#showOpacity();
  }

  #showOpacity() {
    this.canvas.style.opacity = this.photo.src ? 1 - this.model.get("photo_opacity") : 1;
  }

  #showReading() {
    const view = this.model.get("reading");
    this.reading.style.visibility = view.byteLength ? "visible" : "hidden";
    if (view.byteLength) this.#paint(this.reading, bytes(view));
  }

  #showAgreement() {
    const found = new Map(this.model.get("agreement").map((row) => [row.id, row]));
    this.rows.forEach((row, id) => {
      const [recall, f1] = row.querySelectorAll(".ec2-number");
      recall.textContent = found.get(id)?.recall.toFixed(0) ?? "";
      f1.textContent = found.get(id)?.f1.toFixed(0) ?? "";
    });
  }

  #showStatus() {
    this.status.textContent = this.model.get("status");
    this.root.classList.toggle("ec2-busy", this.model.get("busy"));
  }

  #showStrip() {
    const items = this.model.get("strip").map((item) =>
      make("button", {
        type: "button", className: "ec2-item", title: `${item.about}; click to restore`,
        onclick: () => this.model.send({ type: "restore", number: item.number }),
      }, make("img", { alt: item.about, src: this.#url(`strip ${item.number}`, item.picture) })));
    this.strip.replaceChildren(...items);
  }

  #download(name, view) {
    make("a", { href: this.#url("download", view), download: name }).click();
  }

  remove() {
    this.off.forEach((off) => off());
    this.urls.forEach((url) => URL.revokeObjectURL(url));
  }
}

export default {
  render({ model, el }) {
    const painter = new Painter(model, el);
    return () => painter.remove();
  },
};
