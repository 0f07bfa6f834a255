// What a receipt, a proof and their parts consist of, as docs/receipts.md describes them; whatever
// has another form is refused.

import { NotRead } from "./strict_json.js";

// A type is a function that takes a value and where it stands, and throws NotRead.
const whole = (pattern) => `^(?:${pattern})(?![\\s\\S])`;
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

function expect(kind, value, path, orNull = "") {
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

function text(pattern = null, longest = Infinity) {
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

function integer(least = null, most = null) {
  return (value, path, orNull) => {
    expect("int", value, path, orNull);
    if (least !== null && value < least) refuse(`Expected \`int\` >= ${least}`, path);
    if (most !== null && value > most) refuse(`Expected \`int\` <= ${most}`, path);
  };
}

/** One of these texts, or this one integer. */
function oneOf(...values) {
  return (value, path) => {
    expect(kindOf(values[0]), value, path);
    if (!values.includes(value)) {
      refuse(`Invalid enum value ${typeof value === "string" ? quoted(value) : value}`, path);
    }
  };
}

function object(value, path, orNull) {
  expect("object", value, path, orNull);
  value.forEach((item) => any(item, `${path}[...]`));
}

function list(type) {
  return (value, path) => {
    expect("array", value, path);
    value.forEach((item, i) => type(item, `${path}[${i}]`));
  };
}

const orNull = (type) => (value, path) => {
  if (value !== null) type(value, path, " | null");
};

/** An object with these members; a pair gives the value that one has if it is left out, and with
 * undefined it then has none. */
function record(members) {
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
const count = integer(-MAX_INTEGER, MAX_INTEGER);
const countFrom0 = integer(0n, MAX_INTEGER);
const requestId = text(whole("req_[0-9a-z_]{1,60}"));
const nodeId = text(whole("node_[0-9a-f]{64}"));
const digest = text(whole("[0-9a-f]{64}"));
const signature = text(whole("[0-9a-f]{128}"));
const name = text(whole(String.raw`[^\x00-\x1f\x7f-\x9f]+`), 256);
const shown = text(whole(String.raw`[^\x00-\x1f\x7f-\x9f]*`), 256);
const time = text(
  whole("[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(?:[.][0-9]{3})?Z"),
);
const price = record({ currency: shown, prompt: text(), cached: text(), completion: text() });

export const NOT_A_BOX = "upstream, not executed by a box";

export const receiptView = record({
  request_id: text(),
  node_id: text(),
  model: text(),
  timestamp: text(),
  payment_amount: text(),
  coordinator_signature: text(),
  signed_receipt: text(),
  object: [text(), "receipt"],
  opening: [orNull(object), null],
  inclusion: [orNull(text()), null],
});

export const receipt = record({
  request_id: requestId,
  timestamp: time,
  coordinator_id: nodeId,
  node_id: nodeId,
  model: name,
  model_digest: digest,
  payment_amount: text(),
  currency: shown,
  finish_reason: name,
  routing: object,
  proofs: list(record({ signed: text(), signature: text() })),
  prompt_commitment: digest,
  output_commitment: digest,
  usage: record({ prompt_tokens: count, completion_tokens: count, cached_tokens: count }),
  price: [orNull(price), null],
  v: [integer(), 2n],
});

// What follows the counts of a leg, whoever served it.
const endOfLeg = {
  finish_reason: name,
  started_at: time,
  ttft_ms: orNull(countFrom0),
  duration_ms: countFrom0,
  price,
  choice: [integer(), 0n],
  prompt: [integer(), 0n],
};

export const proof = record({
  request_id: requestId,
  leg: integer(),
  node_id: nodeId,
  model: name,
  model_digest: digest,
  engine: record({ build: shown, device: shown }),
  sampling: object,
  prompt_commitment: digest,
  output_commitment: digest,
  prompt_tokens: count,
  completion_tokens: count,
  cached_tokens: count,
  shifted_tokens: integer(),
  ...endOfLeg,
  witness: [orNull(nodeId), null],
  mark: [orNull(signature), null],
  v: [integer(), 2n],
  exactness: [name, undefined],
  logits_sha256: [digest, undefined],
});

export const upstreamLeg = record({
  request_id: requestId,
  leg: integer(),
  node_id: nodeId,
  model: name,
  upstream: name,
  upstream_model: shown,
  sampling: object,
  prompt_commitment: digest,
  output_commitment: digest,
  prompt_tokens: countFrom0,
  completion_tokens: countFrom0,
  cached_tokens: countFrom0,
  tokens_counted_by: oneOf("upstream", "estimate"),
  ...endOfLeg,
  kind: [oneOf(NOT_A_BOX), NOT_A_BOX],
  v: [oneOf(3n), 3n],
});

/** Whether this is said of an upstream's leg; throws NotRead where it can be neither. */
export function isOfUpstream(value) {
  expect("object", value, "$");
  const kind = value.get("kind") ?? null;
  if (kind !== null) expect("str", kind, "$.kind", " | null");
  return kind !== null;
}
