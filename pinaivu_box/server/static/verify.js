// The verification of a receipt, in whatever runs JavaScript: no page, no network, no WebCrypto.
//
// The same checks in the same order and words as `pinaivu receipts verify`, which is
// receipts/verify.py; tests compare the two.  A signature says who claimed what; it does not say
// that the claim is true.

import { bytesOf, hexOf, utf8 } from "./bytes.js";
import { check, either } from "./checks.js";
import * as ed25519 from "./ed25519.js";
import { logChecks } from "./log_checks.js";
import { NoPrice, cost, decimal } from "./prices.js";
import * as form from "./receipt_form.js";
import { sha256 } from "./sha2.js";
import { NotRead, parse, start, textOf } from "./strict_json.js";
import { transcriptChecks } from "./transcript_checks.js";

const RECEIPT_VERSIONS = [1n, 2n, 3n];
const EXACT_VERSION = 4n;
const PROOF_VERSIONS = [1n, 2n, EXACT_VERSION];
const UPSTREAM_VERSION = 3n;
const SHOWN = ["request_id", "node_id", "model", "timestamp", "payment_amount"];
const OPENED = ["prompt", "output", "legs", "prompts", "stop"];
const OPENING = ["nonce", "tokens_sha256", "text_sha256", "logprobs_sha256", "vectors_sha256"];
const PAUSE_EVERY_MS = 40; // the page goes on in between

const sum = (numbers) => numbers.reduce((a, b) => a + b, 0n);

/**
 * Check a receipt as `GET /v1/receipts/{request_id}` serves it: its bytes or its text, exactly as
 * they came, or the object that was read from them.
 *
 * `nodeKey`: the public key (64 hex digits, with or without `node_`) that the visitor trusts.
 * `log`: what the visitor asks of the log and its witnesses (see `logChecks`); `transcript`: that of
 * the request, if there is one (see `transcriptChecks`).  `onCheck` is called with each check once it
 * is made.  Ends after the first check without which the rest mean nothing.
 */
export async function verifyReceipt(
  view,
  { nodeKey = null, log = {}, transcript = null, onCheck = () => {} } = {},
) {
  const checks = [];
  let paused = Date.now();
  for (const made of allChecks(view, nodeKey, log, transcript)) {
    checks.push(made);
    onCheck(made);
    if (Date.now() - paused < PAUSE_EVERY_MS) continue;
    await new Promise((resolve) => setTimeout(resolve));
    paused = Date.now();
  }
  return checks;
}

function* allChecks(document, nodeKey, log, transcript) {
  let view, receipt;
  try {
    view = parse(textIn(document));
    form.receiptView(view, "$");
    checkOpening(view);
    receipt = parse(view.get("signed_receipt"));
    form.receipt(receipt, "$");
  } catch (error) {
    if (!(error instanceof NotRead)) throw error;
    yield check("format", false, `this is not a receipt: ${error.message}`);
    return;
  }
  const first = [version(receipt), coordinator(view, receipt)];
  yield* first;
  if (!first.every((made) => made.ok)) return;
  yield shownFields(view, receipt);
  const proofs = [];
  for (const [number, signed] of receipt.get("proofs").entries()) {
    const [made, proof] = proofCheck(number, signed, receipt);
    yield made;
    if (proof) proofs.push(proof);
  }
  const whole = proofs.length === receipt.get("proofs").length;
  if (whole) {
    yield order(receipt, proofs);
    yield usage(receipt, proofs);
    if (proofs.length) yield payment(receipt, proofs);
  }
  yield* logChecks(view, receipt, log);
  if (nodeKey !== null) yield trusted(receipt, nodeKey);
  if (transcript !== null) yield* transcriptChecks(view, receipt, whole ? proofs : [], transcript);
}

function textIn(document) {
  if (typeof document === "string") return document;
  if (document instanceof Uint8Array) return textOf(document);
  return JSON.stringify(document);
}

/** There may be nothing in it but what opens commitments. */
function checkOpening(view) {
  if (view.get("object") !== "receipt") throw new NotRead("its `object` is not `receipt`");
  const refuse = (name) => {
    throw new NotRead(`its opening contains unknown field \`${start(name, 100)}\``);
  };
  for (const [name, value] of view.get("opening") ?? []) {
    if (!OPENED.includes(name)) refuse(name);
    for (const opening of [value].flat()) {
      if (!(opening instanceof Map)) continue;
      for (const field of opening.keys()) if (!OPENING.includes(field)) refuse(field);
    }
  }
}

/** Whether the node signed this text, and not for another purpose. */
function isSigned(nodeId, domain, text, signature) {
  if (!/^[0-9a-f]{128}$/.test(signature)) return false;
  const key = bytesOf(nodeId.slice("node_".length));
  return ed25519.verify(bytesOf(signature), utf8(`${domain}\n${text}`), key);
}

function version(receipt) {
  const v = receipt.get("v");
  const known = RECEIPT_VERSIONS.includes(v);
  const unknown = known ? "" : `; ${RECEIPT_VERSIONS.join(", ")} are known`;
  return check("format", known, `a receipt of version ${v}${unknown}`);
}

function coordinator(view, receipt) {
  const node = receipt.get("coordinator_id");
  const [text, signature] = [view.get("signed_receipt"), view.get("coordinator_signature")];
  return either(
    "coordinator signature",
    isSigned(node, "pinaivu/receipt/v1", text, signature),
    `${node} signed every byte of this receipt`,
    `the signature is not ${node}'s: the receipt was altered or forged`,
  );
}

function shownFields(view, receipt) {
  const different = SHOWN.filter((name) => view.get(name) !== receipt.get(name));
  return either(
    "shown fields",
    !different.length,
    "the fields beside the signed receipt are the ones that were signed",
    `${different.join(", ")} beside the signed receipt say something else than it does`,
  );
}

/** The check of a proof, or of what is in its place, and what it says if it holds. */
function proofCheck(number, signed, receipt) {
  const id = `proof ${number}`;
  const [text, signature] = [signed.get("signed"), signed.get("signature")];
  const fails = (why) => [check(id, false, why), null];
  let proof;
  try {
    proof = parse(text);
    if (form.isOfUpstream(proof)) {
      form.upstreamLeg(proof, "$");
      return upstreamCheck(`leg ${number}`, proof, text, signature, receipt);
    }
    form.proof(proof, "$");
  } catch (error) {
    if (!(error instanceof NotRead)) throw error;
    return fails(`this is not a proof: ${error.message}`);
  }
  const [node, witness] = [proof.get("node_id"), proof.get("witness")];
  const signer = witness ?? node;
  if (!isSigned(signer, "pinaivu/proof/v1", text, signature)) {
    return fails(`the signature is not ${signer}'s`);
  }
  const [v, most] = [proof.get("v"), receipt.get("v")];
  const least = v === EXACT_VERSION ? 2n : v; // of the receipt
  const hasFields = ["exactness", "logits_sha256"].every(
    (field) => proof.has(field) === (v === EXACT_VERSION),
  );
  if (!PROOF_VERSIONS.includes(v) || least > most || !hasFields) {
    const known = PROOF_VERSIONS.join(", ");
    return fails(`a proof of version ${v} in a receipt of version ${most}; ${known} are known`);
  }
  const other = difference(proof, receipt, ["request_id", "model", "model_digest"]);
  if (other) return fails(other);
  const isExact = proof.get("exactness")?.startsWith("bitwise:") ?? false;
  const claim =
    `it ran ${proof.get("model")} (file sha256 ${proof.get("model_digest")}) and made ` +
    `${proof.get("completion_tokens")} tokens` +
    (isExact ? `, which can be made again to the bit (${proof.get("exactness")})` : "");
  if (witness !== null) return witnessedCheck(id, proof, receipt, claim);
  return [check(id, true, `${node} signed that ${claim}`), proof];
}

function difference(proof, receipt, fields) {
  const field = fields.find((name) => proof.get(name) !== receipt.get(name));
  return field ? `it is about another ${field}: ${proof.get(field)}` : "";
}

function upstreamCheck(id, leg, text, signature, receipt) {
  const [node, other] = [leg.get("node_id"), receipt.get("coordinator_id")];
  const signers = [...new Set([node, other])];
  const signer = signers.find((id) => isSigned(id, "pinaivu/upstream/v1", text, signature));
  const why = upstreamFault(leg, receipt, signers, signer);
  if (why) return [check(id, false, why), null];
  const counted = leg.get("tokens_counted_by") === "upstream" ? "" : " (as it estimates)";
  const says =
    signer === node
      ? `${node} says that it`
      : `${other} says that ${node}, which was lost before it signed,`;
  const said =
    `${form.NOT_A_BOX}: ${says} asked the upstream ${leg.get("upstream")} for ` +
    `${leg.get("upstream_model")} and got ${leg.get("completion_tokens")} tokens${counted}; ` +
    "nobody proves what ran there";
  return [check(id, true, said), leg];
}

/** What is wrong with the statement about an upstream's leg; empty if nothing is. */
function upstreamFault(leg, receipt, signers, signer) {
  if (!signer) return `the signature is not ${signers.join(" or ")}'s`;
  if (receipt.get("v") !== UPSTREAM_VERSION) {
    return `a leg of an upstream in a receipt of version ${receipt.get("v")}`;
  }
  return difference(leg, receipt, ["request_id", "model"]);
}

/** The check of a node that was lost: what it had sent by then. */
function witnessedCheck(id, proof, receipt, claim) {
  const [node, witness, mark] = ["node_id", "witness", "mark"].map((name) => proof.get(name));
  if (witness !== receipt.get("coordinator_id")) {
    return [check(id, false, `its witness ${witness} did not coordinate this request`), proof];
  }
  const lost = `${node} was lost before its proof (${proof.get("finish_reason")})`;
  const said = `the coordinator says that ${claim}`;
  if (mark === null) return [check(id, true, `${lost}; ${said}`), proof];
  const marked = ["request_id", "choice", "leg", "completion_tokens", "output_commitment"];
  const text = marked.map((name) => proof.get(name)).join(" ");
  const ok = isSigned(node, "pinaivu/mark/v1", text, mark);
  const meaning = ok
    ? "it had signed the output by then"
    : "the mark on its output is not its own";
  return [check(id, ok, `${lost}; ${meaning}; ${said}`), proof];
}

const isUpstreamLeg = (proof) => proof.has("upstream");

/** Every choice has legs 0, 1, 2, ..., and the prompts are those that were committed to: with their
 * tokens by boxes, and without them for upstreams. */
function order(receipt, proofs) {
  const legs = new Map();
  const prompts = new Map();
  const ofKind = new Map();
  let whole = proofs.length > 0;
  for (const proof of proofs) {
    const [choice, prompt] = [proof.get("choice"), proof.get("prompt")];
    const commitment = proof.get("prompt_commitment");
    const leg = legs.get(choice) ?? 0n;
    whole &&= proof.get("leg") === leg;
    legs.set(choice, leg + 1n);
    if (!prompts.has(prompt)) prompts.set(prompt, commitment);
    const kind = `${prompt} ${isUpstreamLeg(proof)}`;
    if (!ofKind.has(kind)) ofKind.set(kind, commitment);
    whole &&= ofKind.get(kind) === commitment;
  }
  const numbers = [...prompts.keys()].sort((a, b) => (a < b ? -1 : 1));
  const together = ofSeveral(numbers.map((number) => prompts.get(number)));
  return either(
    "legs",
    whole && together === receipt.get("prompt_commitment"),
    "the proofs are about the prompt of this receipt, and no leg of an answer is missing",
    "the proofs are about another prompt, or a leg of an answer is missing or doubled",
  );
}

function ofSeveral(commitments) {
  if (commitments.length === 1) return commitments[0];
  const domain = hexOf(utf8("pinaivu/commitments/v1\n"));
  return hexOf(sha256(bytesOf(domain + commitments.join(""))));
}

/** The first proof of each prompt: a prompt is paid once. */
function promptsOf(proofs) {
  const first = new Map();
  for (const proof of proofs) {
    if (!first.has(proof.get("prompt"))) first.set(proof.get("prompt"), proof);
  }
  return [...first.values()];
}

function usage(receipt, proofs) {
  const billed = receipt.get("usage");
  const [prompt, cached, completion] = tokensOf(billed);
  const prompts = promptsOf(proofs);
  const total = (list, name) => sum(list.map((proof) => proof.get(name)));
  const same =
    proofs.length > 0 &&
    proofs.every((proof) => proof.get("completion_tokens") >= 0n) &&
    prompt === total(prompts, "prompt_tokens") &&
    cached === total(prompts, "cached_tokens") &&
    prompt >= cached &&
    cached >= 0n &&
    completion === total(proofs, "completion_tokens") &&
    receipt.get("node_id") === proofs.at(-1).get("node_id");
  return either(
    "usage",
    same,
    `the tokens that were billed (${prompt} prompt, ${completion} completion) are the ones that ` +
      `${signersOf(receipt, proofs)} signed for`,
    "the receipt counts other tokens or names another node than its proofs do",
  );
}

const tokensOf = (usage) =>
  ["prompt_tokens", "cached_tokens", "completion_tokens"].map((name) => usage.get(name));

function signersOf(receipt, proofs) {
  const own = proofs.filter(
    (proof) => isUpstreamLeg(proof) && proof.get("node_id") === receipt.get("coordinator_id"),
  );
  if (!own.length) return "the serving nodes";
  return "the coordinator" + (own.length < proofs.length ? " and the serving nodes" : "");
}

function payment(receipt, proofs) {
  const price = receipt.get("price") ?? proofs.at(-1).get("price");
  let due;
  try {
    due = decimal(totalCost(proofs, receipt.get("price")));
  } catch (error) {
    if (!(error instanceof NoPrice)) throw error;
    return check("payment", false, `the price is none: ${error.message}`);
  }
  const [paid, currency] = [receipt.get("payment_amount"), receipt.get("currency")];
  const [prompt, cached, completion] = tokensOf(receipt.get("usage"));
  const terms =
    `${prompt - cached} prompt tokens at ${price.get("prompt")}, ${cached} cached ones at ` +
    `${price.get("cached")} and ${completion} completion tokens at ${price.get("completion")} ` +
    "per 1,000";
  return either(
    "payment",
    due === paid && price.get("currency") === currency,
    `${paid} ${currency} is the price of ${terms}`,
    `${terms} cost ${due} ${price.get("currency")}, the receipt says ${paid}`,
  );
}

function totalCost(proofs, price) {
  const prompts = promptsOf(proofs);
  const costs = proofs.map((proof) => {
    const paysPrompt = prompts.some((other) => isSame(other, proof));
    const [prompt, cached, completion] = tokensOf(proof);
    const asked = price ?? proof.get("price");
    return paysPrompt ? cost(asked, prompt, cached, completion) : cost(asked, 0n, 0n, completion);
  });
  return sum(costs);
}

/** Whether two values say the same; 1 and 1.0 do. */
function isSame(a, b) {
  if (a === b) return true;
  if (a instanceof Map && b instanceof Map) {
    return a.size === b.size && [...a].every(([name, value]) => b.has(name) && isSame(value, b.get(name)));
  }
  if (Array.isArray(a) && Array.isArray(b)) {
    return a.length === b.length && a.every((item, i) => isSame(item, b[i]));
  }
  const isNumeric = (value) => ["bigint", "number", "boolean"].includes(typeof value);
  return isNumeric(a) && isNumeric(b) && a == b;
}

function trusted(receipt, nodeKey) {
  const signer = receipt.get("coordinator_id");
  const expected = `node_${nodeKey.replace(/^node_/, "").toLowerCase()}`;
  return either(
    "trusted key",
    signer === expected,
    "the signer is the box that you named",
    `signed by ${signer}, not by ${expected}`,
  );
}
