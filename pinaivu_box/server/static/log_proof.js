// Proofs that a log has an entry (C2SP tlog-proof), with the checkpoint of the log (tlog-checkpoint)
// and its signatures (signed-note): what they say, and the Merkle tree (RFC 9162, section 2.1).
//
// The same as log/ of the box, in the same words.  Indices and sizes are BigInts.

import { bytesOf, isSame, joined, ofBase64, utf8 } from "./bytes.js";
import { sha256 } from "./sha2.js";
import { NotRead } from "./strict_json.js";

const HEADER = "c2sp.org/tlog-proof@v1";
const INDEX = /^index (0|[1-9][0-9]{0,15})(?![\s\S])/;
const SIZE = /^(0|[1-9][0-9]{0,15})(?![\s\S])/;
const ORIGIN = /^pinaivu\/log\/(node_[0-9a-f]{64})\/(?:0|[1-9][0-9]{0,15})(?![\s\S])/;
const WITNESS = /^pinaivu\/witness\/(node_[0-9a-f]{64})(?![\s\S])/;
// Without spaces as Unicode has them, and without a plus.
const NAME =
  /^[^\t-\r\x1c-\x20\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000+]{1,256}(?![\s\S])/u;
const MAX_SIZE = 2n ** 53n;
const MAX_NOTE_BYTES = 65536;
const MAX_SIGNATURES = 64;
const MAX_HASHES = 63;
const HASH_BYTES = 32;
const KEY_ID_BYTES = 4;
const DASH = "\u2014 ";
const LOG_KEY = 0x01; // the type of a key that signs checkpoints, and of a witness's
const WITNESS_KEY = 0x04;

/** What a text says that proves an entry, unverified: `index`, `hashes` and the checkpoint: its
 * `text`, `origin`, `node` (the id of the box whose log it is), `size`, `root`, and `signatures`,
 * each with `name`, `keyId` and `data`.  Throws NotRead. */
export function readProof(text) {
  const end = text.indexOf("\n\n");
  const [header, index, ...hashes] = text.slice(0, Math.max(0, end)).split("\n");
  if (header !== HEADER || index === undefined) {
    throw new NotRead("it is not a proof in the form of C2SP tlog-proof");
  }
  const number = INDEX.exec(index);
  if (!number) throw new NotRead("its index is not a number");
  const note = readNote(text.slice(end + 2));
  const checkpoint = readCheckpoint(note.text);
  return { index: BigInt(number[1]), hashes: readHashes(hashes), ...note, ...checkpoint };
}

function readHashes(lines) {
  const hashes = lines.map(decoded);
  if (hashes.length > MAX_HASHES || hashes.some((hash) => hash.length !== HASH_BYTES)) {
    throw new NotRead(`a proof has at most ${MAX_HASHES} hashes of ${HASH_BYTES} bytes`);
  }
  return hashes;
}

function readNote(data) {
  if (utf8(data).length > MAX_NOTE_BYTES) {
    throw new NotRead(`it is longer than ${MAX_NOTE_BYTES} bytes`);
  }
  if (/[\x00-\x09\x0b-\x1f]/.test(data)) throw new NotRead("it contains a control character");
  const end = data.lastIndexOf("\n\n");
  if (end < 0 || end + 2 === data.length || !data.endsWith("\n")) {
    throw new NotRead("it has no signatures after an empty line");
  }
  const signatures = data.slice(end + 2, -1).split("\n").map(readSignature);
  if (signatures.length > MAX_SIGNATURES) {
    throw new NotRead(`it has more than ${MAX_SIGNATURES} signatures`);
  }
  if (new Set(signatures.map(({ name, keyId }) => `${name} ${keyId}`)).size < signatures.length) {
    throw new NotRead("two of its signatures are by one key");
  }
  return { text: data.slice(0, end + 1), signatures };
}

function readSignature(line) {
  const named = line.startsWith(DASH) ? line.slice(DASH.length) : "";
  const end = named.indexOf(" ");
  const name = named.slice(0, Math.max(0, end));
  if (!NAME.test(name)) {
    throw new NotRead("one of its signatures is not a dash, a name and Base64");
  }
  const data = decoded(named.slice(end + 1));
  if (data.length <= KEY_ID_BYTES) throw new NotRead("one of its signatures is too short");
  return { name, keyId: data.slice(0, KEY_ID_BYTES), data: data.slice(KEY_ID_BYTES) };
}

function readCheckpoint(text) {
  const lines = text.split("\n");
  if (lines.length !== 4 || lines[3]) {
    throw new NotRead("a checkpoint has three lines: origin, size and root");
  }
  const origin = ORIGIN.exec(lines[0]);
  if (!origin) throw new NotRead("its origin is not that of a box's log");
  if (!SIZE.test(lines[1]) || BigInt(lines[1]) > MAX_SIZE) {
    throw new NotRead("its size is not a number");
  }
  const [size, root] = [BigInt(lines[1]), decoded(lines[2])];
  if (root.length !== HASH_BYTES || (!size && !isSame(root, sha256(new Uint8Array())))) {
    throw new NotRead("its root is not that of a tree of this size");
  }
  return { origin: lines[0], node: origin[1], size, root };
}

function decoded(text) {
  const bytes = ofBase64(text);
  if (!bytes) throw new NotRead("it contains a text that is not Base64 in its one spelling");
  return bytes;
}

/** Whether a line of signatures says that it is the log's; not whether it is. */
export function isOfLog(signature, { origin, node }) {
  return signature.name === origin && isSame(signature.keyId, keyId(origin, LOG_KEY, node));
}

/** The id of the box whose cosignature a line says it is, unverified; null if it says no such thing. */
export function witnessOf({ name, keyId: id }) {
  const node = WITNESS.exec(name)?.[1];
  return node && isSame(id, keyId(name, WITNESS_KEY, node)) ? node : null;
}

function keyId(name, type, node) {
  const key = bytesOf(node.slice("node_".length));
  return sha256(joined(utf8(`${name}\n`), Uint8Array.of(type), key)).slice(0, KEY_ID_BYTES);
}

/** Whether the hashes lead from an entry to the root (RFC 9162, section 2.1.3.2). */
export function includes({ root, size, index, hashes }, entry) {
  if (index >= size) return false;
  let [position, last] = [index, size - 1n];
  let current = sha256(joined(Uint8Array.of(0), entry));
  for (const sibling of hashes) {
    if (last === 0n) return false;
    if (position & 1n || position === last) {
      current = nodeHash(sibling, current);
      while (!(position & 1n) && position) [position, last] = [position >> 1n, last >> 1n];
    } else {
      current = nodeHash(current, sibling);
    }
    [position, last] = [position >> 1n, last >> 1n];
  }
  return last === 0n && isSame(current, root);
}

const nodeHash = (left, right) => sha256(joined(Uint8Array.of(1), left, right));
