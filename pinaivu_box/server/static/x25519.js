// X25519 (RFC 7748).  WebCrypto has it in new browsers, and not on a page over plain HTTP.
//
// It does not hide from other programs of the machine how long it takes: only keys that its user
// has typed into a page are multiplied here, which no other machine can time.

const P = 2n ** 255n - 19n;
const BASE = Uint8Array.from({ length: 32 }, (_, i) => (i ? 0 : 9));
const mod = (a) => ((a %= P) < 0n ? a + P : a);

function inverse(number) {
  let result = 1n;
  for (let base = mod(number), exponent = P - 2n; exponent; exponent >>= 1n) {
    if (exponent & 1n) result = (result * base) % P;
    base = (base * base) % P;
  }
  return result;
}

const littleEndian = (bytes) => bytes.reduceRight((number, byte) => (number << 8n) | BigInt(byte), 0n);

function bytesOf(number) {
  return Uint8Array.from({ length: 32 }, (_, i) => Number((number >> BigInt(8 * i)) & 255n));
}

/** The x coordinate of a private key times a point; both have 32 bytes, and so has the result. */
export function multiplied(privateKey, point) {
  const scalar = (BigInt.asUintN(254, littleEndian(privateKey)) | (1n << 254n)) & ~7n;
  const x1 = mod(BigInt.asUintN(255, littleEndian(point)));
  let [x2, z2, x3, z3] = [1n, 0n, x1, 1n];
  let swapped = 0n;
  for (let bit = 254n; bit >= 0n; bit--) {
    const next = (scalar >> bit) & 1n;
    if (next !== swapped) [x2, z2, x3, z3] = [x3, z3, x2, z2];
    swapped = next;
    const [a, b] = [x2 + z2, x2 - z2];
    const [aa, bb] = [(a * a) % P, (b * b) % P];
    const e = aa - bb;
    const [da, cb] = [((x3 - z3) * a) % P, ((x3 + z3) * b) % P];
    [x3, z3] = [((da + cb) * (da + cb)) % P, (x1 * ((da - cb) * (da - cb) % P)) % P];
    [x2, z2] = [(aa * bb) % P, (e * (aa + 121665n * e)) % P];
  }
  if (swapped) [x2, z2] = [x3, z3];
  return bytesOf(mod(x2 * inverse(z2)));
}

export const publicKeyOf = (privateKey) => multiplied(privateKey, BASE);
