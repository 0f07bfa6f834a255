// Opens what libsodium's crypto_box_seal has sealed: X25519, and XSalsa20 with Poly1305, under a
// nonce that is the BLAKE2b of both public keys.

import { blake2b } from "./blake2b.js";
import { isSame, joined } from "./bytes.js";
import { multiplied, publicKeyOf } from "./x25519.js";

const KEY_BYTES = 32;
const TAG_BYTES = 16;
const NONCE_BYTES = 24;
const BLOCK_BYTES = 64;
const SIGMA = new TextEncoder().encode("expand 32-byte k");
const ZERO = new Uint8Array(32);
// The quarter rounds of a double round: columns, then rows.
const QUARTERS = [
  [0, 4, 8, 12], [5, 9, 13, 1], [10, 14, 2, 6], [15, 3, 7, 11],
  [0, 1, 2, 3], [5, 6, 7, 4], [10, 11, 8, 9], [15, 12, 13, 14],
];

/** The pair of a private key of 32 bytes. */
export const keyPair = (privateKey) => ({ privateKey, publicKey: publicKeyOf(privateKey) });

/** The bytes that were sealed to a pair of keys; null if they were not. */
export function openSealed(sealed, { privateKey, publicKey }) {
  if (sealed.length < KEY_BYTES + TAG_BYTES) return null;
  const [sender, tag] = [sealed.subarray(0, KEY_BYTES), sealed.subarray(KEY_BYTES, KEY_BYTES + TAG_BYTES)];
  const content = sealed.subarray(KEY_BYTES + TAG_BYTES);
  const shared = multiplied(privateKey, sender);
  if (isSame(shared, ZERO)) return null;
  const nonce = blake2b(joined(sender, publicKey), NONCE_BYTES);
  const key = subkey(subkey(shared, new Uint8Array(16)), nonce.subarray(0, 16));
  const stream = salsa20(key, nonce.subarray(16), KEY_BYTES + content.length);
  if (!isSame(poly1305(stream.subarray(0, KEY_BYTES), content), tag)) return null;
  return content.map((byte, i) => byte ^ stream[KEY_BYTES + i]);
}

/** What Salsa20 works on: a key of 32 bytes, and 16 bytes of input. */
function words(key, input) {
  const bytes = joined(
    SIGMA.subarray(0, 4), key.subarray(0, 16), SIGMA.subarray(4, 8), input,
    SIGMA.subarray(8, 12), key.subarray(16), SIGMA.subarray(12),
  );
  const view = new DataView(bytes.buffer);
  return Int32Array.from({ length: 16 }, (_, i) => view.getInt32(4 * i, true));
}

function twentyRounds(start) {
  const x = start.slice();
  const turn = (to, a, b, by) => {
    const sum = (x[a] + x[b]) | 0;
    x[to] ^= (sum << by) | (sum >>> (32 - by));
  };
  for (let double = 0; double < 10; double++) {
    for (const [a, b, c, d] of QUARTERS) {
      turn(b, a, d, 7);
      turn(c, b, a, 9);
      turn(d, c, b, 13);
      turn(a, d, c, 18);
    }
  }
  return x;
}

function bytesOf(numbers) {
  const view = new DataView(new ArrayBuffer(4 * numbers.length));
  numbers.forEach((number, i) => view.setInt32(4 * i, number, true));
  return new Uint8Array(view.buffer);
}

/** HSalsa20: a key that follows from another one and 16 bytes. */
function subkey(key, input) {
  const x = twentyRounds(words(key, input));
  return bytesOf([0, 5, 10, 15, 6, 7, 8, 9].map((i) => x[i]));
}

/** The first bytes of the stream of a key and a nonce of 8 bytes. */
function salsa20(key, nonce, length) {
  const stream = new Uint8Array(Math.ceil(length / BLOCK_BYTES) * BLOCK_BYTES);
  const counter = new DataView(new ArrayBuffer(8));
  for (let block = 0; block * BLOCK_BYTES < length; block++) {
    counter.setBigUint64(0, BigInt(block), true);
    const start = words(key, joined(nonce, new Uint8Array(counter.buffer)));
    const ended = twentyRounds(start).map((one, i) => one + start[i]);
    stream.set(bytesOf(ended), block * BLOCK_BYTES);
  }
  return stream.subarray(0, length);
}

const P = 2n ** 130n - 5n;
const CLAMP = 0x0ffffffc0ffffffc0ffffffc0fffffffn;

const littleEndian = (bytes) => bytes.reduceRight((number, byte) => (number << 8n) | BigInt(byte), 0n);

/** The tag of a message under a key of 32 bytes that is used once (RFC 8439, section 2.5). */
function poly1305(key, message) {
  const r = littleEndian(key.subarray(0, 16)) & CLAMP;
  let sum = 0n;
  for (let at = 0; at < message.length; at += 16) {
    const block = message.subarray(at, at + 16);
    sum = ((sum + littleEndian(block) + (1n << BigInt(8 * block.length))) * r) % P;
  }
  sum += littleEndian(key.subarray(16));
  return Uint8Array.from({ length: TAG_BYTES }, (_, i) => Number((sum >> BigInt(8 * i)) & 255n));
}
