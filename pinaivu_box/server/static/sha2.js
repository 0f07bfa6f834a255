// SHA-256 and SHA-512 (FIPS 180-4), HMAC and HKDF.  WebCrypto has them, but not on a page over plain
// HTTP.
//
// A 64-bit word of SHA-512 is two 32-bit integers, its high and its low half.

import { joined } from "./bytes.js";

/** The first `bits` bits behind the point of the `degree`-th root of each of the first primes. */
function rootFractions(count, degree, bits) {
  const primes = [];
  for (let n = 2; primes.length < count; n++) {
    if (primes.every((prime) => n % prime)) primes.push(n);
  }
  return primes.map((prime) => {
    const scaled = BigInt(prime) << BigInt(bits * degree);
    let root = 0n;
    for (let bit = 1n << BigInt(bits + 5); bit; bit >>= 1n) {
      if ((root | bit) ** BigInt(degree) <= scaled) root |= bit;
    }
    return BigInt.asUintN(bits, root);
  });
}

const halves = (words) => Int32Array.from(words.flatMap((w) => [Number(w >> 32n), Number(w & 0xffffffffn)]));
const K512 = halves(rootFractions(80, 3, 64)); // high, low, high, low, ...
const H512 = halves(rootFractions(8, 2, 64));
const K256 = Int32Array.from({ length: 64 }, (_, i) => K512[2 * i]);
const H256 = Int32Array.from({ length: 8 }, (_, i) => H512[2 * i]);

/** The message with its padding: a bit 1, zeros, and its length in bits, in whole blocks. */
function padded(message, blockBytes) {
  const lengthBytes = blockBytes / 8;
  const blocks = Math.ceil((message.length + 1 + lengthBytes) / blockBytes);
  const bytes = new Uint8Array(blocks * blockBytes);
  bytes.set(message);
  bytes[message.length] = 0x80;
  const view = new DataView(bytes.buffer);
  view.setBigUint64(bytes.length - 8, BigInt(message.length) * 8n);
  return view;
}

function digestOf(words) {
  const digest = new DataView(new ArrayBuffer(words.length * 4));
  words.forEach((word, i) => digest.setInt32(4 * i, word));
  return new Uint8Array(digest.buffer);
}

const rotated = (word, by) => (word >>> by) | (word << (32 - by));

/** The 32 bytes of the digest of a Uint8Array. */
export function sha256(message) {
  const blocks = padded(message, 64);
  const state = H256.slice();
  const w = new Int32Array(64);
  for (let start = 0; start < blocks.byteLength; start += 64) {
    for (let t = 0; t < 16; t++) w[t] = blocks.getInt32(start + 4 * t);
    for (let t = 16; t < 64; t++) {
      const early = w[t - 15];
      const late = w[t - 2];
      const s0 = rotated(early, 7) ^ rotated(early, 18) ^ (early >>> 3);
      const s1 = rotated(late, 17) ^ rotated(late, 19) ^ (late >>> 10);
      w[t] = s1 + w[t - 7] + s0 + w[t - 16];
    }
    let [a, b, c, d, e, f, g, h] = state;
    for (let t = 0; t < 64; t++) {
      const sum1 = rotated(e, 6) ^ rotated(e, 11) ^ rotated(e, 25);
      const sum0 = rotated(a, 2) ^ rotated(a, 13) ^ rotated(a, 22);
      const t1 = (h + sum1 + ((e & f) ^ (~e & g)) + K256[t] + w[t]) | 0;
      const t2 = (sum0 + ((a & b) ^ (a & c) ^ (b & c))) | 0;
      [h, g, f, e, d, c, b, a] = [g, f, e, (d + t1) | 0, c, b, a, (t1 + t2) | 0];
    }
    [a, b, c, d, e, f, g, h].forEach((word, i) => (state[i] += word));
  }
  return digestOf(state);
}

/** A half of a word that is rotated right by less than 32: `near` is this half. */
const turned = (near, far, by) => (near >>> by) | (far << (32 - by));

/** Add words, given as [high, low, high, low, ...], into `out` at the word `at`. */
function addInto(out, at, words) {
  let high = 0;
  let low = 0;
  for (let i = 0; i < words.length; i += 2) {
    high += words[i];
    low += words[i + 1] >>> 0;
  }
  out[2 * at] = high + Math.floor(low / 2 ** 32);
  out[2 * at + 1] = low;
}

/** The 64 bytes of the digest of a Uint8Array. */
export function sha512(message) {
  const blocks = padded(message, 128);
  const state = H512.slice();
  const w = new Int32Array(160);
  const v = new Int32Array(16); // a to h
  const t1 = new Int32Array(2);
  for (let start = 0; start < blocks.byteLength; start += 128) {
    for (let t = 0; t < 32; t++) w[t] = blocks.getInt32(start + 4 * t);
    for (let t = 16; t < 80; t++) {
      const eh = w[2 * t - 30]; // 15 words before
      const el = w[2 * t - 29];
      const lh = w[2 * t - 4]; // 2 words before
      const ll = w[2 * t - 3];
      addInto(w, t, [
        turned(lh, ll, 19) ^ turned(ll, lh, 29) ^ (lh >>> 6),
        turned(ll, lh, 19) ^ turned(lh, ll, 29) ^ turned(ll, lh, 6),
        w[2 * t - 14], w[2 * t - 13],
        turned(eh, el, 1) ^ turned(eh, el, 8) ^ (eh >>> 7),
        turned(el, eh, 1) ^ turned(el, eh, 8) ^ turned(el, eh, 7),
        w[2 * t - 32], w[2 * t - 31],
      ]);
    }
    v.set(state);
    for (let t = 0; t < 80; t++) {
      const [ah, al, bh, bl, ch, cl, dh, dl, eh, el, fh, fl, gh, gl, hh, hl] = v;
      addInto(t1, 0, [
        hh, hl,
        turned(eh, el, 14) ^ turned(eh, el, 18) ^ turned(el, eh, 9),
        turned(el, eh, 14) ^ turned(el, eh, 18) ^ turned(eh, el, 9),
        (eh & fh) ^ (~eh & gh), (el & fl) ^ (~el & gl),
        K512[2 * t], K512[2 * t + 1], w[2 * t], w[2 * t + 1],
      ]);
      v.copyWithin(2, 0, 14);
      addInto(v, 4, [dh, dl, t1[0], t1[1]]);
      addInto(v, 0, [
        t1[0], t1[1],
        turned(ah, al, 28) ^ turned(al, ah, 2) ^ turned(al, ah, 7),
        turned(al, ah, 28) ^ turned(ah, al, 2) ^ turned(ah, al, 7),
        (ah & bh) ^ (ah & ch) ^ (bh & ch), (al & bl) ^ (al & cl) ^ (bl & cl),
      ]);
    }
    for (let i = 0; i < 8; i++) {
      addInto(state, i, [state[2 * i], state[2 * i + 1], v[2 * i], v[2 * i + 1]]);
    }
  }
  return digestOf(state);
}

/** HMAC (RFC 2104) with SHA-256; the key has at most 64 bytes. */
function hmacSha256(key, message) {
  const block = Uint8Array.from({ length: 64 }, (_, i) => key[i] ?? 0);
  const pad = (byte) => block.map((one) => one ^ byte);
  return sha256(joined(pad(0x5c), sha256(joined(pad(0x36), message))));
}

/** 32 bytes by HKDF-SHA256 (RFC 5869) without salt. */
export function hkdfSha256(key, info) {
  const extracted = hmacSha256(new Uint8Array(32), key);
  return hmacSha256(extracted, joined(info, Uint8Array.of(1)));
}
