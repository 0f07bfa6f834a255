// The playground: one request, its answer as it is made, and what is known of it.

import { AnswerView } from "./answer_view.js";
import { address, byId, call, copyableId, element, eventsOf, send } from "./page.js";
import { samples } from "./request_samples.js";

const TOP = 5; // alternatives of each token
const SAVED = "pinaivu.playground"; // the settings, without the texts
const STOP_DELAY = 700; // milliseconds, in which the box notices that a request was stopped
const RECEIPT_DELAYS = [400, 800, 1600, 3200, 0]; // milliseconds between attempts to get a receipt

const form = byId("request");

const sleep = (delay) => new Promise((resolve) => setTimeout(resolve, delay));

let running = null; // what stops the request
let latest = null; // the answer of the last request
let language = "curl";

/** The request in the form.  Throws an Error if it holds no valid one. */
function bodyOf() {
  const fields = new FormData(form);
  const text = (name) => String(fields.get(name) ?? "");
  const number = (name) => (text(name).trim() === "" ? undefined : Number(text(name)));
  const system = text("system").trim();
  const stop = text("stop").split("\n").filter(Boolean);
  const body = {
    model: text("model"),
    messages: [
      ...(system ? [{ role: "system", content: system }] : []),
      { role: "user", content: text("message") },
    ],
    temperature: number("temperature"),
    top_p: number("top_p"),
    max_tokens: number("max_tokens"),
    seed: number("seed"),
    stop: stop.length ? stop : undefined,
    response_format: formatOf(text("format"), text("schema")),
    ...(fields.get("logprobs") ? { logprobs: true, top_logprobs: TOP } : {}),
  };
  return JSON.parse(JSON.stringify(body)); // without what is undefined
}

function formatOf(type, schema) {
  if (type === "text") return undefined;
  if (type === "json_object") return { type };
  try {
    return { type, json_schema: { name: "answer", strict: true, schema: JSON.parse(schema) } };
  } catch (error) {
    throw new Error(`The schema is not JSON: ${error.message}`);
  }
}

// The request

async function ask() {
  if (running) return;
  fail("");
  let body;
  try {
    body = bodyOf();
  } catch (error) {
    fail(error.message);
    return;
  }
  running = new AbortController();
  const { signal } = running;
  byId("send").hidden = true;
  byId("stop").hidden = false;
  byId("receipt").hidden = true;
  const answer = (latest = new AnswerView());
  let requestId = "";
  try {
    const request = { ...body, stream: true, stream_options: { include_usage: true } };
    const response = await send("POST", "/v1/chat/completions", request, { signal });
    requestId = response.headers.get("x-request-id") ?? "";
    for await (const { data } of eventsOf(response)) {
      if (data === "[DONE]") break;
      if (data.error) throw new Error(data.error.message);
      answer.add(data);
    }
    answer.end();
  } catch (error) {
    answer.end(signal.aborted ? "stopped" : "failed");
    if (!signal.aborted) fail(error.message);
  }
  running = null;
  byId("send").hidden = false;
  byId("stop").hidden = true;
  if (signal.aborted) await sleep(STOP_DELAY);
  if (requestId && answer.begun) await showReceipt(requestId, () => answer === latest);
}

function fail(text) {
  byId("failure").textContent = text;
}

// The receipt

/** Nothing is shown any more once another request was sent: then it is not `current`. */
async function showReceipt(requestId, current) {
  if (!current()) return;
  const state = byId("receipt-state");
  byId("receipt").hidden = false;
  byId("checks").replaceChildren();
  byId("receipt-id").replaceChildren(copyableId(requestId, "request id"));
  byId("receipt-link").href = address(`/explorer/r/${encodeURIComponent(requestId)}`);
  state.className = "";
  state.textContent = "Verifying …";
  try {
    const receipt = await receiptOf(requestId);
    const { verifyReceipt } = await import("./verify.js");
    const checks = await verifyReceipt(receipt);
    if (!current()) return;
    const failed = checks.filter((check) => !check.ok).length;
    state.className = failed ? "bad" : "ok";
    state.textContent = failed
      ? `${failed} of ${checks.length} checks failed: do not trust this receipt.`
      : `All ${checks.length} checks passed, in this browser.`;
    byId("checks").replaceChildren(...checks.map(checkElement));
  } catch (error) {
    if (!current()) return;
    state.className = "bad";
    state.textContent = error.message;
  }
}

function checkElement({ ok, text }) {
  const verdict = element("span", { class: "out-of-sight" }, ok ? "Passed: " : "Failed: ");
  return element("li", { class: ok ? "ok" : "bad" }, verdict, element("span", {}, text));
}

async function receiptOf(requestId) {
  for (const delay of RECEIPT_DELAYS) {
    try {
      return await call("GET", `/v1/receipts/${encodeURIComponent(requestId)}`);
    } catch (error) {
      if (error.status !== 404 || !delay) throw error;
    }
    await sleep(delay);
  }
  throw new Error("There is no receipt yet.");
}

// The form

function showCode() {
  try {
    byId("code").textContent = samples[language](location.origin + address("/v1"), bodyOf());
  } catch (error) {
    byId("code").textContent = error.message;
  }
}

function choose(tab) {
  for (const other of document.querySelectorAll("[role=tab]")) {
    other.setAttribute("aria-selected", String(other === tab));
    other.tabIndex = other === tab ? 0 : -1;
  }
  language = tab.dataset.language;
  byId("code").setAttribute("aria-labelledby", tab.id);
  showCode();
}

function changed() {
  byId("schema").hidden = form.elements.format.value !== "json_schema";
  showCode();
  const fields = new FormData(form);
  fields.delete("message");
  fields.delete("system");
  try {
    sessionStorage.setItem(SAVED, JSON.stringify(Object.fromEntries(fields)));
  } catch {
    // this browser stores nothing
  }
}

/** Fill the form as it was left, and with the model in the address. */
function restore() {
  let saved = {};
  try {
    saved = JSON.parse(sessionStorage.getItem(SAVED) ?? "{}");
  } catch {
    // this browser stores nothing
  }
  const model = new URLSearchParams(location.search).get("model");
  for (const [name, value] of Object.entries({ ...saved, ...(model ? { model } : {}) })) {
    const field = form.elements.namedItem(name);
    const options = [...(field?.options ?? [])].map((option) => option.value);
    if (field?.type === "checkbox") field.checked = true;
    else if (field && (!options.length || options.includes(value))) field.value = value;
  }
}

function moveTab(event, tabs, place) {
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (!step) return;
  const next = tabs[(place + step + tabs.length) % tabs.length];
  choose(next);
  next.focus();
}

if (form) {
  restore();
  changed();
  form.addEventListener("input", changed);
  byId("message").addEventListener("input", showCode);
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    ask();
  });
  byId("stop").addEventListener("click", () => running?.abort());
  document.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
    if (event.key === "Escape") running?.abort();
  });
  document.querySelectorAll("[role=tab]").forEach((tab, place, tabs) => {
    tab.addEventListener("click", () => choose(tab));
    tab.addEventListener("keydown", (event) => moveTab(event, [...tabs], place));
  });
}
