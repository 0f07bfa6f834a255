// A document that a visitor gives to a script of the page: a file, or its text.

const MAX_FILE_BYTES = 50_000_000; // the largest receipt or transcript is far below

/** The parts of a `document` of components.html.  What was given last counts; `onFile` is called
 * once a file was chosen. */
export class GivenDocument {
  constructor(place, onFile = () => {}) {
    [this.file, this.text] = [place.querySelector("input"), place.querySelector("textarea")];
    this.file.addEventListener("change", () => {
      if (!this.file.files.length) return;
      this.text.value = "";
      onFile();
    });
    this.text.addEventListener("input", () => (this.file.value = ""));
  }

  /** Its text or its bytes; null if there is none.  Throws an Error. */
  async read() {
    if (this.text.value.trim()) return this.text.value.trim();
    const [chosen] = this.file.files;
    if (!chosen) return null;
    if (chosen.size > MAX_FILE_BYTES) throw new Error("This file is too large.");
    return new Uint8Array(await chosen.arrayBuffer());
  }
}
