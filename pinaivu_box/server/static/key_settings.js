// The settings of a key: between a form's fields and the API's policy.

import { listOf, numberOf, textOf } from "./admin.js";

/** The policy in a form; null stands for a default. */
export function policyOf(fields) {
  return {
    scopes: fields.getAll("scopes"),
    models: listOf(fields.get("models")),
    networks: listOf(fields.get("networks")),
    peers: listOf(fields.get("peers")),
    rpm: numberOf(fields.get("rpm")),
    tpm: numberOf(fields.get("tpm")),
    max_parallel: numberOf(fields.get("max_parallel")),
    max_queue: numberOf(fields.get("max_queue")),
    weight: numberOf(fields.get("weight")),
    routing: textOf(fields.get("routing")),
    strict: fields.get("strict") === "on" || null,
    budget: budgetOf(textOf(fields.get("budget")), textOf(fields.get("period"))),
    prices: pricesOf(fields.get("prices")),
  };
}

function budgetOf(amount, period) {
  if (amount === null) return null;
  return period === null ? { amount } : { amount, period };
}

function pricesOf(text) {
  const prices = {};
  for (const line of String(text ?? "").split("\n").map((each) => each.trim()).filter(Boolean)) {
    const [glob, price, more] = line.split("=").map((part) => part.trim());
    const parts = (price ?? "").split("/").map((part) => part.trim());
    if (!glob || !price || more !== undefined || parts.length > 3) {
      throw new Error(`'${line}' is no price: write GLOB=PRICE or GLOB=PROMPT/COMPLETION.`);
    }
    if (parts.length === 1) prices[glob] = price;
    else prices[glob] = { prompt: parts[0], completion: parts.at(-1) };
    if (parts.length === 3) prices[glob].cached = parts[1];
  }
  return Object.keys(prices).length ? prices : null;
}

function priceText([glob, price]) {
  if (typeof price === "string") return `${glob}=${price}`;
  const parts = [price.prompt, price.cached, price.completion];
  return `${glob}=${parts.filter((part) => part !== undefined && part !== null).join("/")}`;
}

/** What the fields of a key's form hold. */
export function fieldsOf({ name, policy, expires_at }) {
  return {
    ...policy,
    name,
    models: policy.models.join(", "),
    networks: policy.networks.join(", "),
    peers: policy.peers.join(", "),
    budget: policy.budget?.amount,
    period: policy.budget?.period,
    prices: Object.entries(policy.prices).map(priceText).join("\n"),
    max_queue: policy.max_queue || "",
    weight: policy.weight === 1 ? "" : policy.weight,
    expires_at: localText(expires_at),
  };
}

/** The time in a field of the type datetime-local; null if it is empty. */
export function expiryOf(fields) {
  const text = textOf(fields.get("expires_at"));
  return text === null ? null : new Date(text).toISOString();
}

/** A time as a field of the type datetime-local has it. */
export function localText(time) {
  if (!time) return "";
  const moment = new Date(time);
  return new Date(moment - moment.getTimezoneOffset() * 60_000).toISOString().slice(0, 16);
}
