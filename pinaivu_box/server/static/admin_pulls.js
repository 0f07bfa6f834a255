// Pulling a model, with its progress.  Whoever leaves the page stops the pull.

import { on, onSent, open, refresh, sizeText, textOf } from "./admin.js";
import { byId, partsOf, send } from "./page.js";

const panel = byId("pull");
const state = byId("pull-state");
const bar = byId("pull-progress");

let running = null; // what cancels it

on("pull-any", () => open("pull-dialog"));
on("pull", ({ model }) => start({ model }));
on("pull-cancel", () => running?.abort());

onSent("pull-dialog", async (fields) => {
  const body = { model: fields.get("model").trim() };
  if (textOf(fields.get("as"))) body.as = textOf(fields.get("as"));
  if (textOf(fields.get("from"))) body.from = textOf(fields.get("from"));
  await start(body);
});

/** Returns once the box has begun; throws what it says if it does not. */
async function start(body) {
  if (running) throw new Error("Another model is being pulled: wait for it, or cancel it.");
  running = new AbortController();
  const { signal } = running;
  byId("pull-model").textContent = body.as ?? body.model;
  state.textContent = "Looking it up …";
  state.classList.remove("bad");
  bar.removeAttribute("value");
  byId("pull-running").hidden = panel.hidden = false;
  try {
    const response = await send("POST", "/v1/admin/models/pull", body, { signal });
    panel.scrollIntoView({ block: "nearest" });
    watch(response, signal);
  } catch (error) {
    running = null;
    panel.hidden = true;
    throw error;
  }
}

async function watch(response, signal) {
  let last = null;
  const progress = new Progress();
  try {
    for await (const line of partsOf(response, "\n")) {
      last = JSON.parse(line);
      progress.show(last);
    }
    if (last?.state !== "done") {
      throw new Error(last?.message || "The connection broke: pull again, and it goes on.");
    }
    const license = last.license ? ` Licence: ${last.license}.` : "";
    state.textContent = last.message || `${last.model} is served.${license}`;
    bar.value = 1;
  } catch (error) {
    state.classList.toggle("bad", !signal.aborted);
    state.textContent = signal.aborted
      ? "Cancelled. What has been copied is kept for the next time."
      : error.message;
    bar.value = 0;
  }
  running = null;
  byId("pull-running").hidden = true;
  await refresh().catch(() => {});
}

class Progress {
  constructor() {
    this.begun = performance.now();
    this.first = null; // bytes that were there already
  }

  show(line) {
    this.first ??= line.bytes;
    if (!line.size) return;
    bar.value = line.bytes / line.size;
    state.textContent = line.state === "checking" ? "Checking its digest …" : this.text(line);
  }

  text(line) {
    const parts = [`${sizeText(line.bytes)} of ${sizeText(line.size)}`];
    const seconds = (performance.now() - this.begun) / 1000;
    const speed = seconds > 1 ? (line.bytes - this.first) / seconds : 0;
    if (speed > 0) {
      parts.push(`${sizeText(speed)}/s`, `${timeText((line.size - line.bytes) / speed)} left`);
    }
    const sources = line.sources.map((source) => source.name).filter(Boolean);
    if (sources.length) parts.push(`from ${sources.join(", ")}`);
    return parts.join(" · ");
  }
}

function timeText(seconds) {
  if (seconds < 90) return `${Math.ceil(seconds)} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  return `${(seconds / 3600).toFixed(1)} h`;
}
