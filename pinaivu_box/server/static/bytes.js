// Bytes, and how they are written: UTF-8, hexadecimal, Base64.

export const utf8 = (text) => new TextEncoder().encode(text);

export const bytesOf = (hex) =>
  Uint8Array.from(hex.match(/../g) ?? [], (pair) => parseInt(pair, 16));

export const hexOf = (bytes) =>
  Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");

export function joined(...parts) {
  const whole = new Uint8Array(parts.reduce((length, part) => length + part.length, 0));
  let at = 0;
  for (const part of parts) {
    whole.set(part, at);
    at += part.length;
  }
  return whole;
}

export const isSame = (a, b) => a.length === b.length && a.every((byte, i) => byte === b[i]);

const BASE64 = /^(?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?(?![\s\S])/;

/** The bytes that a text is the one Base64 of (RFC 4648, section 4); null if it is of none. */
export function ofBase64(text) {
  if (!BASE64.test(text)) return null;
  const letters = atob(text);
  return btoa(letters) === text ? Uint8Array.from(letters, (one) => one.charCodeAt(0)) : null;
}
