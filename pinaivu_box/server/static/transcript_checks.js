// Whether a transcript is what the proofs of a receipt commit to: the checks of
// receipts/verify_transcript.py, in the same words.

import { bytesOf, hexOf, joined, utf8 } from "./bytes.js";
import { check, either } from "./checks.js";
import { readTranscript } from "./given_transcript.js";
import { sha256 } from "./sha2.js";
import { NotRead } from "./strict_json.js";
import * as form from "./transcript_form.js";

/** `document` is the transcript as somebody gives it, its bytes or its text, and `secret` the API
 * key that opens it, null if there is none.  `proofs`: those of the receipt, all of them, or none
 * if one is wrong. */
export function* transcriptChecks(view, receipt, proofs, { document, secret = null }) {
  let transcript, openings;
  try {
    transcript = readTranscript(document, secret);
    const why = notOf(transcript, receipt, proofs);
    if (why) throw new NotRead(why);
    openings = openingsOf(view, proofs);
  } catch (error) {
    if (!(error instanceof NotRead)) throw error;
    yield check("transcript", false, error.message);
    return;
  }
  const holds = "it is that of this request, and has nothing of which the receipt has no proof";
  yield check("transcript", true, holds);
  for (const [number, proof] of proofs.entries()) {
    yield legCheck(number, transcript, proof, openings[number]);
  }
}

const legOf = (each) => `${each.get("choice")} ${each.get("leg")}`;

/** Why the transcript is not the receipt's; empty if it may be. */
function notOf(transcript, receipt, proofs) {
  const other = ["request_id", "model"].find((name) => transcript.get(name) !== receipt.get(name));
  if (other) return `it is about another ${other}: ${transcript.get(other)}`;
  if (!proofs.length) return "without the receipt's proofs nothing can be compared with it";
  const prompts = transcript.get("prompts").map((each) => each.get("prompt"));
  const legs = transcript.get("legs").map(legOf);
  if (new Set(prompts).size < prompts.length || new Set(legs).size < legs.length) {
    return "it has a prompt or a leg twice";
  }
  const made = proofs.filter((proof) => !proof.has("upstream"));
  const proven = [new Set(made.map((proof) => proof.get("prompt"))), new Set(made.map(legOf))];
  if (!prompts.every((one) => proven[0].has(one)) || !legs.every((one) => proven[1].has(one))) {
    return "it has a prompt or a leg of which the receipt has no proof";
  }
  return "";
}

/** Of each proof what opens its commitments to prompt and output.  Throws NotRead. */
function openingsOf(view, proofs) {
  const opening = view.get("opening") ?? new Map();
  try {
    const prompts = opening.has("prompts") ? opening.get("prompts") : [opening.get("prompt")];
    const legs = opening.get("legs");
    [prompts, legs].forEach((list) => form.openings(list, "$"));
    const pairs = proofs.map((proof, i) => [prompts[Number(proof.get("prompt"))], legs[i]]);
    if (legs.length === proofs.length && pairs.every(([prompt]) => prompt)) return pairs;
  } catch (error) {
    if (!(error instanceof NotRead)) throw error;
  }
  throw new NotRead("the receipt has no openings for its legs: ask the key's owner");
}

function legCheck(number, transcript, proof, [prompt, output]) {
  const id = `transcript ${number}`;
  const another = (why) => check(id, false, `the transcript is another: ${why}`);
  if (proof.has("upstream")) {
    return another("an upstream made the leg, of which no tokens are known");
  }
  const asked = transcript.get("prompts").find((each) => each.get("prompt") === proof.get("prompt"));
  const made = transcript.get("legs").find((each) => legOf(each) === legOf(proof));
  if (!asked || !made) return another("it does not have the prompt, or the leg");
  if (!opens(asked.get("asked"), asked.get("tokens"), prompt, 1n, proof.get("prompt_commitment"))) {
    return another("its prompt is not what was committed to");
  }
  const committed = proof.get("output_commitment");
  if (!opens(made.get("text"), made.get("tokens"), output, proof.get("v"), committed)) {
    return another("its output is not what was committed to");
  }
  const why = miscount(proof, asked, made);
  return either(
    id,
    !why,
    `its prompt and output are what ${proof.get("node_id")} committed to, token by token`,
    `the proof is wrong: ${why}`,
  );
}

/** Whether the opening is one of that version, of this text and these tokens, and leads to the
 * commitment. */
function opens(text, tokens, opening, version, committed) {
  const [nonce, ofTokens, ...parts] = [
    "nonce",
    "tokens_sha256",
    "text_sha256",
    "logprobs_sha256",
    "vectors_sha256",
  ].map((name) => opening.get(name));
  const ofText = hexOf(sha256(utf8(text)));
  if (ofTokens !== hexOf(sha256(tokenBytes(tokens)))) return false;
  if (version > 1n ? parts[0] !== ofText || !parts.every(Boolean) : parts.some(Boolean)) return false;
  const domain = utf8(`pinaivu/commitment/v${version > 1n ? 2 : 1}\n`);
  const rest = bytesOf(nonce + ofText + ofTokens + parts[1] + parts[2]);
  return hexOf(sha256(joined(domain, rest))) === committed;
}

/** Each as an unsigned 32-bit integer, little-endian. */
function tokenBytes(tokens) {
  const view = new DataView(new ArrayBuffer(4 * tokens.length));
  tokens.forEach((token, i) => view.setUint32(4 * i, Number(token), true));
  return new Uint8Array(view.buffer);
}

/** What is wrong with the tokens that a proof counts; empty if they are as many as it commits to. */
function miscount(proof, asked, made) {
  for (const [what, of] of [["prompt", asked], ["completion", made]]) {
    const [counted, tokens] = [proof.get(`${what}_tokens`), of.get("tokens").length];
    if (counted !== BigInt(tokens)) return `it counts ${counted} ${what} tokens, and commits to ${tokens}`;
  }
  return "";
}
