// What a transcript consists of, and what opens the commitments of a receipt, as docs/receipts.md
// describes them; whatever has another form is refused.

import {
  boolean,
  digest,
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

const token = integer(0n, 2n ** 32n - 1n);
const part = [text(whole("([0-9a-f]{64})?")), ""];

export const transcript = record({
  request_id: requestId,
  model: name,
  prompts: list(
    record({
      prompt: integer(),
      asked: text(),
      tokens: list(token),
      thinking: [boolean, false],
    }),
  ),
  legs: list(
    record({
      choice: integer(),
      leg: integer(),
      tokens: list(token),
      text: text(),
    }),
  ),
  tools: [orNull(object), null],
  constraint: [orNull(object), null],
  template: [object, new Map()],
  system: [text(), ""],
  v: [oneOf(1n), 1n],
});

/** As `GET /v1/receipts/{request_id}/transcript` returns it. */
export const transcriptDocument = record({
  request_id: requestId,
  transcript: [orNull(transcript), null],
  sealed: [orNull(text()), null],
  sealed_to: [orNull(text()), null],
  object: [oneOf("transcript"), "transcript"],
});

export const openings = list(
  record({
    nonce: digest,
    tokens_sha256: part,
    text_sha256: part,
    logprobs_sha256: part,
    vectors_sha256: part,
  }),
);
