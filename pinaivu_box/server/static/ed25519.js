// Verification of Ed25519 signatures (RFC 8032), as strict as libsodium: S and the key have their
// one canonical form, and neither the key nor R is of small order.
//
// All that it reads is public, so it takes as long as it takes.

import { sha512 } from "./sha2.js";

const P = 2n ** 255n - 19n; // the field
const L = 2n ** 252n + 27742317777372353535851937790883648493n; // the order of the base point
const mod = (a) => ((a %= P) < 0n ? a + P : a);

function power(base, exponent) {
  let result = 1n;
  for (let b = mod(base); exponent; exponent >>= 1n, b = (b * b) % P) {
    if (exponent & 1n) result = (result * b) % P;
  }
  return result;
}

const inverse = (a) => power(a, P - 2n);
const D = mod(-121665n * inverse(121666n));
const ROOT_OF_MINUS_1 = power(2n, (P - 1n) / 4n);

// A point is [X, Y, Z, T] with x = X/Z, y = Y/Z and x·y = T/Z.
const NEUTRAL = [0n, 1n, 1n, 0n];

function fromProduct(e, f, g, h) {
  return [(e * f) % P, (g * h) % P, (f * g) % P, (e * h) % P];
}

function sum([x1, y1, z1, t1], [x2, y2, z2, t2]) {
  const a = ((y1 - x1) * (y2 - x2)) % P;
  const b = ((y1 + x1) * (y2 + x2)) % P;
  const c = (((2n * D * t1) % P) * t2) % P;
  const d = (2n * z1 * z2) % P;
  return fromProduct(b - a, d - c, d + c, b + a);
}

function doubled([x, y, z]) {
  const a = (x * x) % P;
  const b = (y * y) % P;
  const h = a + b;
  const g = a - b;
  const e = h - (((x + y) * (x + y)) % P);
  return fromProduct(e, ((2n * z * z) % P) + g, g, h);
}

const negated = ([x, y, z, t]) => [-x, y, z, -t];

function isOfSmallOrder(point) {
  const [x, y, z] = doubled(doubled(doubled(point)));
  return mod(x) === 0n && mod(y - z) === 0n;
}

function littleEndian(bytes) {
  let number = 0n;
  for (let i = bytes.length - 1; i >= 0; i--) number = (number << 8n) | BigInt(bytes[i]);
  return number;
}

/** The point in these 32 bytes; null if there is none, or in another form than the canonical. */
function decoded(bytes) {
  const number = littleEndian(bytes);
  const y = BigInt.asUintN(255, number);
  if (y >= P) return null;
  // x² = u/v; a candidate for its root is u·v³·(u·v⁷)^((p-5)/8).
  const u = mod(y * y - 1n);
  const v = mod(D * y * y + 1n);
  const v3 = (v * v * v) % P;
  let x = (u * v3 * power(u * v3 * v3 * v, (P - 5n) / 8n)) % P;
  const square = (v * x * x) % P;
  if (square !== u) {
    if (square !== mod(-u)) return null;
    x = (x * ROOT_OF_MINUS_1) % P;
  }
  const sign = number >> 255n;
  if (x === 0n && sign) return null;
  if ((x & 1n) !== sign) x = P - x;
  return [x, y, 1n, (x * y) % P];
}

function encoded([x, y, z]) {
  const i = inverse(z);
  let number = mod(y * i) | ((mod(x * i) & 1n) << 255n);
  return Uint8Array.from({ length: 32 }, () => {
    const byte = Number(number & 255n);
    number >>= 8n;
    return byte;
  });
}

/** 1, 3, 5, ... times the point. */
function oddMultiples(point, count) {
  const twice = doubled(point);
  const multiples = [point];
  while (multiples.length < count) multiples.push(sum(multiples.at(-1), twice));
  return multiples;
}

/** The scalar in digits that are 0 or odd and below 2^(width-1), the lowest first. */
function sparseDigits(scalar, width) {
  const digits = [];
  for (; scalar; scalar >>= 1n) {
    const digit = scalar & 1n ? BigInt.asIntN(width, scalar) : 0n;
    digits.push(Number(digit));
    scalar -= digit;
  }
  return digits;
}

const BASE_WIDTH = 8;
const KEY_WIDTH = 5;
let baseMultiples = null;

/** s·B + k·point, where B is the base point. */
function combined(s, k, point) {
  baseMultiples ??= oddMultiples(decoded(new Uint8Array(32).fill(0x66).fill(0x58, 0, 1)), 1 << (BASE_WIDTH - 2));
  const parts = [
    [sparseDigits(s, BASE_WIDTH), baseMultiples],
    [sparseDigits(k, KEY_WIDTH), oddMultiples(point, 1 << (KEY_WIDTH - 2))],
  ];
  let result = NEUTRAL;
  for (let i = Math.max(parts[0][0].length, parts[1][0].length) - 1; i >= 0; i--) {
    result = doubled(result);
    for (const [digits, multiples] of parts) {
      const digit = digits[i] ?? 0;
      if (digit > 0) result = sum(result, multiples[digit >> 1]);
      if (digit < 0) result = sum(result, negated(multiples[-digit >> 1]));
    }
  }
  return result;
}

/** Whether the 64 bytes `signature` over `message` were made with the key of the 32 bytes
 * `publicKey`; all three are Uint8Arrays. */
export function verify(signature, message, publicKey) {
  if (signature.length !== 64 || publicKey.length !== 32) return false;
  const r = signature.subarray(0, 32);
  const s = littleEndian(signature.subarray(32));
  if (s >= L) return false;
  const key = decoded(publicKey);
  if (key === null || isOfSmallOrder(key)) return false;
  const hashed = new Uint8Array(64 + message.length);
  hashed.set(r);
  hashed.set(publicKey, 32);
  hashed.set(message, 64);
  const k = littleEndian(sha512(hashed)) % L;
  const point = combined(s, k, negated(key));
  // Its encoding is canonical, so an R in another form never equals it.
  return !isOfSmallOrder(point) && encoded(point).every((byte, i) => byte === r[i]);
}
