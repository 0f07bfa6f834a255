// What a receipt, a proof and their parts consist of, as docs/receipts.md describes them; whatever
// has another form is refused.

import {
  count,
  countFrom0,
  digest,
  expect,
  integer,
  list,
  name,
  object,
  oneOf,
  orNull,
  record,
  requestId,
  text,
  whole,
} from "./json_types.js";

const nodeId = text(whole("node_[0-9a-f]{64}"));
const signature = text(whole("[0-9a-f]{128}"));
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
