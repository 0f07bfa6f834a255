// Files that go with a message: text is read here, images are made smaller here.

import { element as el } from "../page.js";
import { iconButton, isolated } from "./parts.js";

export const MAX_TEXT_BYTES = 256 * 1024; // of all text files of a message
export const MAX_IMAGES = 4;
const MAX_IMAGE_FILE_BYTES = 20 * 1024 * 1024;
const MAX_IMAGE_SIDE = 1536; // pixels: models look at no more
const MAX_IMAGE_CHARACTERS = 1_500_000; // of one image as it is sent

export class Attachments {
  /** `list` shows them, `report` gets the sentence of what was refused. */
  constructor(list, report) {
    this.list = list;
    this.report = report;
    this.items = [];
    this.takesImages = false;
  }

  /** As the endpoint takes them. */
  fields() {
    const files = this.items.filter((item) => !item.url);
    const images = this.items.filter((item) => item.url).map((item) => item.url);
    return { ...(files.length && { files }), ...(images.length && { images }) };
  }

  clear() {
    this.items = [];
    this.show();
  }

  async add(files) {
    const refused = [];
    for (const file of files) {
      try {
        this.items.push(await this.read(file));
      } catch (error) {
        refused.push(error.message);
      }
    }
    this.report(refused.join(" "));
    this.show();
  }

  async read(file) {
    if (file.type.startsWith("image/") && file.type !== "image/svg+xml") return this.readImage(file);
    const used = this.items.reduce((sum, item) => sum + (item.text ?? "").length, 0);
    if (used + file.size > MAX_TEXT_BYTES) {
      throw new Error(`${file.name} is too large: the text files of a message have 256 kB at most.`);
    }
    let text;
    try {
      text = new TextDecoder("utf-8", { fatal: true }).decode(await file.arrayBuffer());
    } catch {
      throw new Error(`${file.name} is no text file in UTF-8.`);
    }
    if (text.includes("\0")) throw new Error(`${file.name} is no text file.`);
    return { name: file.name, text };
  }

  async readImage(file) {
    if (!this.takesImages) throw new Error("This model does not see images: choose another model.");
    if (this.items.filter((item) => item.url).length >= MAX_IMAGES) {
      throw new Error(`A message has ${MAX_IMAGES} images at most.`);
    }
    if (file.size > MAX_IMAGE_FILE_BYTES) {
      throw new Error(`${file.name} is too large: an image may have 20 MB.`);
    }
    let bitmap;
    try {
      bitmap = await createImageBitmap(file);
    } catch {
      throw new Error(`${file.name} is no image that this browser can read.`);
    }
    for (let side = MAX_IMAGE_SIDE; ; side = Math.floor(side * 0.7)) {
      const url = drawn(bitmap, side).toDataURL("image/jpeg", 0.85);
      if (url.length <= MAX_IMAGE_CHARACTERS) return { name: file.name, url };
    }
  }

  show() {
    const shown = this.items.map((item, number) =>
      el(
        "li",
        { class: "attachment" },
        preview(item),
        iconButton("close", `Remove ${item.name}`, () => {
          this.items.splice(number, 1);
          this.show();
        }),
      ),
    );
    this.list.replaceChildren(...shown);
    this.list.hidden = !shown.length;
  }
}

/** What stands for an attachment: its picture, or its name and size. */
export function preview(item) {
  if (item.url) {
    const canvas = el("canvas", { class: "thumbnail", role: "img", "aria-label": item.name });
    showPicture(canvas, item.url).catch(() => canvas.replaceWith(isolated(item.name)));
    return canvas;
  }
  const size = new Blob([item.text ?? ""]).size;
  const label = size < 1000 ? `${size} B` : `${Math.round(size / 1000)} kB`;
  return el("span", { class: "file" }, isolated(item.name), " ", el("small", {}, label));
}

// The page's policy lets no <img> show what is not a file of the box; a canvas needs no address.
async function showPicture(canvas, url) {
  const bytes = Uint8Array.from(atob(url.split(",")[1]), (letter) => letter.charCodeAt(0));
  const bitmap = await createImageBitmap(new Blob([bytes], { type: url.slice(5).split(";")[0] }));
  drawn(bitmap, 320, canvas);
}

function drawn(bitmap, side, canvas = document.createElement("canvas")) {
  const scale = Math.min(1, side / Math.max(bitmap.width, bitmap.height));
  canvas.width = Math.max(1, Math.round(bitmap.width * scale));
  canvas.height = Math.max(1, Math.round(bitmap.height * scale));
  const context = canvas.getContext("2d");
  context.fillStyle = "#fff"; // behind what is transparent
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  return canvas;
}
