// BLAKE2b (RFC 7693) without a key.

const IV = [
  0x6a09e667f3bcc908n, 0xbb67ae8584caa73bn, 0x3c6ef372fe94f82bn, 0xa54ff53a5f1d36f1n,
  0x510e527fade682d1n, 0x9b05688c2b3e6c1fn, 0x1f83d9abfb41bd6bn, 0x5be0cd19137e2179n,
];
// Of each round, the order of the words of a block, a hexadecimal digit each.
const ORDERS = [
  "0123456789abcdef", "ea489fd61c02b753", "b8c052fdae367194", "7931dcbe265a40f8",
  "905724afe1bc683d", "2c6a0b834d75fe19", "c51fed4a0763928b", "db7ec13950f4862a",
  "6fe9b308c2d714a5", "a2847615fb9e3cd0",
].map((digits) => [...digits].map((digit) => parseInt(digit, 16)));
const MIXED = [
  [0, 4, 8, 12], [1, 5, 9, 13], [2, 6, 10, 14], [3, 7, 11, 15],
  [0, 5, 10, 15], [1, 6, 11, 12], [2, 7, 8, 13], [3, 4, 9, 14],
];
const ROUNDS = 12;
const BLOCK_BYTES = 128;

const word = (number) => BigInt.asUintN(64, number);
const rotated = (number, by) => word((number >> by) | (number << (64n - by)));

function mix(v, [a, b, c, d], x, y) {
  v[a] = word(v[a] + v[b] + x);
  v[d] = rotated(v[d] ^ v[a], 32n);
  v[c] = word(v[c] + v[d]);
  v[b] = rotated(v[b] ^ v[c], 24n);
  v[a] = word(v[a] + v[b] + y);
  v[d] = rotated(v[d] ^ v[a], 16n);
  v[c] = word(v[c] + v[d]);
  v[b] = rotated(v[b] ^ v[c], 63n);
}

/** The digest of a Uint8Array, in `length` bytes, up to 64. */
export function blake2b(message, length) {
  const state = [...IV];
  state[0] ^= BigInt(0x01010000 | length);
  const blocks = Math.max(1, Math.ceil(message.length / BLOCK_BYTES));
  const padded = new Uint8Array(blocks * BLOCK_BYTES);
  padded.set(message);
  const view = new DataView(padded.buffer);
  for (let block = 0; block < blocks; block++) {
    const isLast = block === blocks - 1;
    const read = isLast ? message.length : (block + 1) * BLOCK_BYTES;
    const words = Array.from({ length: 16 }, (_, i) => view.getBigUint64(block * BLOCK_BYTES + 8 * i, true));
    const v = [...state, ...IV];
    v[12] ^= BigInt(read);
    if (isLast) v[14] = word(~v[14]);
    for (let round = 0; round < ROUNDS; round++) {
      const order = ORDERS[round % ORDERS.length];
      MIXED.forEach((places, i) => mix(v, places, words[order[2 * i]], words[order[2 * i + 1]]));
    }
    state.forEach((_, i) => (state[i] ^= v[i] ^ v[i + 8]));
  }
  const digest = new DataView(new ArrayBuffer(64));
  state.forEach((one, i) => digest.setBigUint64(8 * i, one, true));
  return new Uint8Array(digest.buffer, 0, length);
}
