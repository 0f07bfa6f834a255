// Characters that nobody sees and that change what is read, as server/pages/visible.py has them for prose.

const HIDDEN = /[\u202a-\u202e\u2060\ufeff\u180e\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]/g;
const NAMES = new Map([
  [0x202a, "Left-To-Right Embedding"],
  [0x202b, "Right-To-Left Embedding"],
  [0x202c, "Pop Directional Formatting"],
  [0x202d, "Left-To-Right Override"],
  [0x202e, "Right-To-Left Override"],
  [0x2060, "Word Joiner"],
  [0xfeff, "Zero Width No-Break Space"],
  [0x180e, "Mongolian Vowel Separator"],
]);

/** The parts of a text: strings, and `{ code, name }` for each such character. */
export function visible(text) {
  const parts = [];
  let end = 0;
  for (const { 0: letter, index } of text.matchAll(HIDDEN)) {
    if (index > end) parts.push(text.slice(end, index));
    const code = letter.codePointAt(0);
    const name = NAMES.get(code) ?? "Control Character";
    parts.push({ code: `U+${code.toString(16).toUpperCase().padStart(4, "0")}`, name });
    end = index + 1;
  }
  if (end < text.length) parts.push(text.slice(end));
  return parts;
}
