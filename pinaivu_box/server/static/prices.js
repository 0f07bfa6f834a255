// Money as receipts have it: decimals outside, whole numbers of 10^-9 of the currency inside.

import { start } from "./strict_json.js";
import { quoted } from "./json_types.js";

const UNITS = 10n ** 9n;
const MAX_AMOUNT = 1_000_000n;
const PRICE_DECIMALS = 6;
const PLAIN = /^(-?)([0-9]{1,30})(?:\.([0-9]{1,30}))?(?:[eE]([+-]?[0-9]{1,3}))?$/;

/** The error for a text that is no price. */
export class NoPrice extends Error {}

/** The price of one token in 10^-9, from that of 1,000.  Throws NoPrice. */
function perToken(text) {
  const [, minus, whole, fraction = "", exponent = "0"] = PLAIN.exec(text) ?? [];
  if (whole === undefined) {
    throw new NoPrice(`${quoted(start(text, 40))}, not a decimal number such as 0.15`);
  }
  const digits = BigInt(whole + fraction);
  // The value is digits · 10^shift / 10^6.
  const shift = Number(exponent) - fraction.length + PRICE_DECIMALS;
  const scale = 10n ** BigInt(Math.abs(shift));
  const scaled = shift < 0 ? digits / scale : digits * scale;
  const exact = shift >= 0 || digits % scale === 0n;
  if (!exact || scaled > MAX_AMOUNT * 10n ** 6n || (minus && digits)) {
    throw new NoPrice(
      `${text}: it must be from 0 to ${MAX_AMOUNT} with at most ${PRICE_DECIMALS} decimals`,
    );
  }
  return scaled;
}

/** The cost in 10^-9 if `cached` of the `prompt` tokens were cached; `price` is a Map of decimals.
 * Throws NoPrice. */
export function cost(price, prompt, cached, completion) {
  const full = perToken(price.get("prompt"));
  const reduced = perToken(price.get("cached"));
  return (prompt - cached) * full + cached * reduced + completion * perToken(price.get("completion"));
}

/** The decimal of an amount in 10^-9, without zeros at its end. */
export function decimal(amount) {
  let part = amount % UNITS;
  if (part < 0n) part += UNITS;
  const whole = (amount - part) / UNITS;
  return `${whole}.${String(part).padStart(9, "0")}`.replace(/0+$/, "").replace(/\.$/, "");
}
