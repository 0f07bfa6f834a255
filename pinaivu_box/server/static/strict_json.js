// JSON as the box reads it: stricter than JSON.parse, and exact.
//
// A member may not be there twice, so that no two readers differ on what a signed text says.  An
// integer becomes a BigInt of the same value, any other number a Number, an object a Map.

const MAX_DEPTH = 900; // about where the box stops reading
const MAX_DIGITS = 4300;
const NUMBER = /-?(?:0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?/y;
const PLAIN = /[^"\\\u0000-\u001f]*/y;
const HALF_PAIR = /\p{Surrogate}/u; // with `u` it is none of a whole pair
const SPACE = /[ \t\n\r]*/y;
const WORDS = { true: true, false: false, null: null };
const ESCAPES = { '"': '"', "\\": "\\", "/": "/", b: "\b", f: "\f", n: "\n", r: "\r", t: "\t" };

/** The error for a text that is not read; its message is the end of a sentence. */
export class NotRead extends Error {}

/** The text of bytes in UTF-8.  Throws NotRead. */
export function textOf(bytes) {
  try {
    return new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(bytes);
  } catch {
    throw new NotRead("it is not in UTF-8");
  }
}

/** The value that a text holds.  Throws NotRead. */
export function parse(text) {
  return new Reader(text).document();
}

class Reader {
  constructor(text) {
    this.text = text;
    this.at = 0;
  }

  document() {
    const value = this.value(0);
    this.space();
    if (this.at < this.text.length) this.refuse();
    return value;
  }

  refuse() {
    throw new NotRead(`it is not JSON from character ${this.at} on`);
  }

  match(pattern) {
    pattern.lastIndex = this.at;
    const found = pattern.exec(this.text);
    if (found) this.at = pattern.lastIndex;
    return found;
  }

  space() {
    this.match(SPACE);
  }

  takes(character) {
    this.space();
    if (this.text[this.at] !== character) return false;
    this.at++;
    return true;
  }

  value(depth) {
    if (depth > MAX_DEPTH) throw new NotRead("it is nested too deeply");
    this.space();
    const next = this.text[this.at];
    if (next === "{") return this.object(depth);
    if (next === "[") return this.array(depth);
    if (next === '"') return this.string();
    for (const [word, value] of Object.entries(WORDS)) {
      if (this.text.startsWith(word, this.at)) {
        this.at += word.length;
        return value;
      }
    }
    return this.number();
  }

  object(depth) {
    const members = new Map();
    this.at++;
    if (this.takes("}")) return members;
    let twice = null; // what is no JSON at all is said first
    do {
      this.space();
      if (this.text[this.at] !== '"') this.refuse();
      const name = this.string();
      if (!this.takes(":")) this.refuse();
      const value = this.value(depth + 1);
      if (members.has(name)) twice ??= name;
      members.set(name, value);
    } while (this.takes(","));
    if (!this.takes("}")) this.refuse();
    if (twice !== null) throw new NotRead(`the field \`${start(twice, 100)}\` is there twice`);
    return members;
  }

  array(depth) {
    const values = [];
    this.at++;
    if (this.takes("]")) return values;
    do values.push(this.value(depth + 1));
    while (this.takes(","));
    if (!this.takes("]")) this.refuse();
    return values;
  }

  number() {
    const found = this.match(NUMBER);
    if (!found) this.refuse();
    const [written, fraction, exponent] = found;
    if (fraction !== undefined || exponent !== undefined) return Number(written);
    if (written.replace("-", "").length > MAX_DIGITS) throw new NotRead("a number in it is too long");
    return BigInt(written);
  }

  string() {
    this.at++;
    let value = "";
    for (;;) {
      value += this.match(PLAIN)[0];
      const next = this.text[this.at++];
      if (next === '"') break;
      if (next !== "\\") {
        this.at--;
        this.refuse();
      }
      value += this.escape();
    }
    if (HALF_PAIR.test(value)) throw new NotRead("a text in it has half of a surrogate pair");
    return value;
  }

  escape() {
    const kind = this.text[this.at++];
    if (Object.hasOwn(ESCAPES, kind ?? "")) return ESCAPES[kind];
    const digits = this.text.slice(this.at, this.at + 4);
    if (kind !== "u" || !/^[0-9a-fA-F]{4}$/.test(digits)) {
      this.at--;
      this.refuse();
    }
    this.at += 4;
    return String.fromCharCode(parseInt(digits, 16));
  }
}

/** The first characters (not halves of one) of a text. */
export function start(text, count) {
  return [...text.slice(0, 2 * count)].slice(0, count).join("");
}
