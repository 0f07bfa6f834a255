// The types of values in JSON, as docs/receipts.md has them, in the words of the box's own reader.

import { NotRead } from "./strict_json.js";

// A type is a function that takes a value and where it stands, and throws NotRead.
export const whole = (pattern) => `^(?:${pattern})(?![\\s\\S])`;
const at = (path) => (path === "$" ? "" : ` - at \`${path}\``);
const refuse = (why, path) => {
  throw new NotRead(why + at(path));
};

function kindOf(value) {
  if (value === null) return "null";
  if (Array.isArray(value)) return "array";
  if (value instanceof Map) return "object";
  return { string: "str", bigint: "int", number: "float", boolean: "bool" }[typeof value];
}

export function expect(kind, value, path, orNull = "") {
  let got = kindOf(value);
  if (got === kind && got === "int") return;
  // Where an integer beyond 64 bits is not expected, it counts as a float.
  if (got === "int" && (value >= 2n ** 64n || value < -(2n ** 63n))) got = "float";
  if (got === "float" && !Number.isFinite(Number(value))) refuse("Number out of range", path);
  if (got !== kind) refuse(`Expected \`${kind}${orNull}\`, got \`${got}\``, path);
}

/** Any value; a number must be one that a computer holds. */
function any(value, path) {
  if (typeof value === "number") expect("float", value, path);
  if (Array.isArray(value)) value.forEach((item) => any(item, `${path}[...]`));
  if (value instanceof Map) value.forEach((item) => any(item, `${path}[...]`));
}

export function text(pattern = null, longest = Infinity) {
  const regex = pattern && new RegExp(pattern, "u");
  return (value, path, orNull) => {
    expect("str", value, path, orNull);
    if (value.length > longest && [...value].length > longest) {
      refuse(`Expected \`str\` of length <= ${longest}`, path);
    }
    if (regex && !regex.test(value)) {
      refuse(`Expected \`str\` matching regex ${quoted(pattern)}`, path);
    }
  };
}

export function integer(least = null, most = null) {
  return (value, path, orNull) => {
    expect("int", value, path, orNull);
    if (least !== null && value < least) refuse(`Expected \`int\` >= ${least}`, path);
    if (most !== null && value > most) refuse(`Expected \`int\` <= ${most}`, path);
  };
}

export function boolean(value, path) {
  expect("bool", value, path);
}

/** One of these texts, or this one integer. */
export function oneOf(...values) {
  return (value, path) => {
    expect(kindOf(values[0]), value, path);
    if (!values.includes(value)) {
      refuse(`Invalid enum value ${typeof value === "string" ? quoted(value) : value}`, path);
    }
  };
}

export function object(value, path, orNull) {
  expect("object", value, path, orNull);
  value.forEach((item) => any(item, `${path}[...]`));
}

export function list(type) {
  return (value, path) => {
    expect("array", value, path);
    value.forEach((item, i) => type(item, `${path}[${i}]`));
  };
}

export const orNull = (type) => (value, path) => {
  if (value !== null) type(value, path, " | null");
};

/** An object with these members; a pair gives the value that one has if it is left out, and with
 * undefined it then has none. */
export function record(members) {
  const types = new Map(Object.entries(members).map(([name, type]) => [name, [type].flat()]));
  return (value, path, orNull) => {
    expect("object", value, path, orNull);
    for (const [name, member] of value) {
      if (!types.has(name)) refuse(`Object contains unknown field \`${name}\``, path);
      types.get(name)[0](member, `${path}.${name}`);
    }
    for (const [name, type] of types) {
      if (value.has(name)) continue;
      if (type.length === 1) refuse(`Object missing required field \`${name}\``, path);
      if (type[1] !== undefined) value.set(name, type[1]);
    }
  };
}

/** A text as Python writes it in an error. */
export function quoted(value) {
  const quote = value.includes("'") && !value.includes('"') ? '"' : "'";
  const hex = (code, digits) => code.toString(16).padStart(digits, "0");
  const shown = [...value].map((character) => {
    const code = character.codePointAt(0);
    if (character === quote || character === "\\") return `\\${character}`;
    const escape = { "\n": "\\n", "\r": "\\r", "\t": "\\t" }[character];
    if (escape) return escape;
    if (character === " " || !/[\p{C}\p{Z}]/u.test(character)) return character;
    if (code < 0x100) return `\\x${hex(code, 2)}`;
    return code < 0x10000 ? `\\u${hex(code, 4)}` : `\\U${hex(code, 8)}`;
  });
  return quote + shown.join("") + quote;
}

const MAX_INTEGER = 2n ** 53n - 1n;
export const count = integer(-MAX_INTEGER, MAX_INTEGER);
export const countFrom0 = integer(0n, MAX_INTEGER);
export const requestId = text(whole("req_[0-9a-z_]{1,60}"));
export const digest = text(whole("[0-9a-f]{64}"));
export const name = text(whole(String.raw`[^\x00-\x1f\x7f-\x9f]+`), 256);
