// Whether a receipt is in its coordinator's log, and who saw that log: three checks, which are those
// of receipts/verify_inclusion.py, in the same words.

import { bytesOf, utf8 } from "./bytes.js";
import { check, either } from "./checks.js";
import * as ed25519 from "./ed25519.js";
import { includes, isOfLog, readProof, witnessOf } from "./log_proof.js";
import { sha256 } from "./sha2.js";
import { NotRead } from "./strict_json.js";

const TIME_BYTES = 8;
const LATEST = 253402300799n; // the last second that RFC 3339 can say, as a Unix time

/**
 * What the visitor asks of the log: with `required` that it has the receipt; with `witnesses` (64
 * hex digits each, with or without `node_`) also that `quorum` of these have cosigned it: all of
 * them if that is null.
 */
export function* logChecks(view, receipt, { required = false, witnesses = [], quorum = null }) {
  const text = view.get("inclusion");
  if (text === null) {
    const missing = "it comes without a proof that its box's log has it: the box could have left it out";
    yield check("log", !required && !witnesses.length, missing);
    return;
  }
  let proof;
  try {
    proof = readProof(text);
  } catch (error) {
    if (!(error instanceof NotRead)) throw error;
    yield check("inclusion", false, `this is not a proof of inclusion: ${error.message}`);
    return;
  }
  yield inclusion(view, proof);
  yield checkpoint(receipt, proof);
  yield witnessed(proof, witnesses, quorum);
}

function inclusion(view, proof) {
  const entry = sha256(utf8(view.get("signed_receipt")));
  return either(
    "inclusion",
    includes(proof, entry),
    `it is entry ${proof.index} (the first is 0) of the ${proof.size} of this checkpoint`,
    `the proof does not lead from this receipt, as entry ${proof.index}, to the checkpoint`,
  );
}

const isSigned = (node, text, signature) =>
  ed25519.verify(signature, utf8(text), bytesOf(node.slice("node_".length)));

function checkpoint(receipt, proof) {
  const [id, node] = ["checkpoint signature", receipt.get("coordinator_id")];
  if (proof.node !== node) {
    return check(id, false, `the log is that of ${proof.node}, and not of ${node}`);
  }
  const signature = proof.signatures.find((each) => isOfLog(each, proof));
  return either(
    id,
    signature !== undefined && isSigned(node, proof.text, signature.data),
    `${node} signed that its log ${proof.origin} had these ${proof.size} entries`,
    `the signature is not ${node}'s: the checkpoint was altered or forged`,
  );
}

function witnessed(proof, witnesses, quorum) {
  let found;
  try {
    found = cosignatures(proof);
  } catch (error) {
    if (!(error instanceof NotRead)) throw error;
    return check("witnesses", false, error.message);
  }
  const meaning = told(found);
  if (!witnesses.length) return check("witnesses", true, meaning);
  const asked = new Set(witnesses.map((key) => `node_${key.replace(/^node_/, "").toLowerCase()}`));
  const needed = quorum ?? asked.size;
  const present = found.filter(({ node }) => asked.has(node)).length;
  const counted = `${present} of the ${asked.size} that you named, of whom ${needed} are needed`;
  return check("witnesses", present >= needed, `${counted}; ${meaning}`);
}

/** All of them, in their order.  Throws NotRead for a signature that is wrong, or whose signer
 * follows from nothing. */
function cosignatures(proof) {
  const lines = proof.signatures.filter((each) => !isOfLog(each, proof));
  const named = lines.map(witnessOf);
  if (named.includes(null)) {
    throw new NotRead("one of the signatures is neither the log's nor a witness's");
  }
  if (named.includes(proof.node)) {
    throw new NotRead(`${proof.node} is no witness of its own log`);
  }
  return lines.map(({ data }, i) => cosignature(proof, named[i], data));
}

function cosignature(proof, node, data) {
  const time = data.slice(0, TIME_BYTES).reduce((number, byte) => (number << 8n) | BigInt(byte), 0n);
  const text = `cosignature/v1\ntime ${time}\n${proof.text}`;
  const right = data.length === TIME_BYTES + 64 && time <= LATEST;
  if (!right || !isSigned(node, text, data.slice(TIME_BYTES))) {
    throw new NotRead(`the cosignature of ${node} is not its own`);
  }
  return { node, time };
}

function told(found) {
  if (!found.length) {
    return "no witness cosigned it: nobody but its box says that its log has no other history";
  }
  const at = (time) => new Date(Number(time) * 1000).toISOString();
  const who = found.map(({ node, time }) => `${node} at ${at(time)}`).join(", ");
  const count = `${found.length} witness${found.length > 1 ? "es" : ""}`;
  return `${count} cosigned it, since it agrees with all that was seen of its log before: ${who}`;
}
