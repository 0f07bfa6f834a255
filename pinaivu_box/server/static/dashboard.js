// The dashboard: what runs now and what has ended, as they come; figures are read again when they
// have changed.

import {
  address, byId, cell, copyableId, element, follow, localTimes, number, timeElement,
} from "./page.js";

const MAX_ROWS = 20;
const live = byId("live");
const running = rowsOf("Running now");
const finished = rowsOf("Finished lately");

function rowsOf(label) {
  return document.querySelector(`[aria-label="${label}"] tbody`);
}

function name(text) {
  return text ? element("bdi", { title: text }, text) : element("span", { class: "muted" }, "-");
}

function milliseconds(value) {
  if (value === null) return "-";
  if (value < 999.5) return `${Math.round(value)} ms`;
  return `${(value / 1000).toFixed(value < 9995 ? 2 : 1)} s`;
}

function runningRow(each) {
  const badge = each.state === "answering" ? "badge accent" : "badge";
  return element(
    "tr", {},
    cell("Request", copyableId(each.request_id, "request id")),
    cell("Model", name(each.model)),
    cell("Key", name(each.key_name)),
    cell("Account", name(each.account_name)),
    cell("Node", name(each.node_name || each.node)),
    cell("State", element("span", { class: badge }, each.state)),
    cell("Seconds", each.seconds.toFixed(1), "numeric"),
    cell("Tokens", number(each.completion_tokens), "numeric"),
  );
}

function finishedRow(each) {
  const id = copyableId(each.request_id, "request id");
  if (each.receipt) {
    const link = element("a", { href: address(`/explorer/r/${each.request_id}`) });
    id.firstChild.before(link);
    link.append(link.nextSibling);
  }
  const kind = each.status === 200 ? "ok" : each.status < 500 ? "warn" : "bad";
  return element(
    "tr", {},
    cell("Finished", timeElement(each.at)),
    cell("Request", id),
    cell("Model", name(each.model)),
    cell("Key", name(each.key_name)),
    cell("Account", name(each.account_name)),
    cell("Node", name(each.node_name || each.node)),
    cell("Tokens", number(each.prompt_tokens + each.completion_tokens), "numeric"),
    cell("First token", milliseconds(each.ttft_ms), "numeric"),
    cell("In all", milliseconds(each.total_ms), "numeric"),
    cell("Cost", `${each.cost} ${each.currency}`, "numeric"),
    cell("Status", element("span", { class: `badge ${kind}` }, String(each.status))),
  );
}

function showNow({ count, running: requests }) {
  byId("now-count").textContent = number(count);
  byId("now-empty").hidden = requests.length > 0;
  running.closest(".scroll").hidden = requests.length === 0;
  // What the pointer or the keyboard is in stays as it is.
  if (!running.contains(document.activeElement)) running.replaceChildren(...requests.map(runningRow));
}

function showFinished(each) {
  byId("finished-empty").hidden = true;
  finished.closest(".scroll").hidden = false;
  finished.prepend(finishedRow(each));
  while (finished.rows.length > MAX_ROWS) finished.lastElementChild.remove();
}

let reading = false;

async function readFigures() {
  const parts = document.querySelectorAll("[data-figures]");
  if (reading || [...parts].some((part) => part.contains(document.activeElement))) return;
  reading = true;
  try {
    const path = `/dashboard/figures${location.search}`;
    const response = await fetch(address(path), { credentials: "same-origin" });
    if (!response.ok || response.redirected) return;
    const parsed = new DOMParser().parseFromString(await response.text(), "text/html");
    for (const part of parts) {
      const fresh = parsed.getElementById(part.id);
      if (!fresh) continue;
      for (const open of part.querySelectorAll("details[open]")) {
        const same = fresh.querySelector(`#${open.id}`);
        if (same) same.open = true;
      }
      localTimes(fresh);
      part.replaceWith(document.adoptNode(fresh));
    }
  } catch {
    // the box cannot be reached: the next event or minute tries again
  } finally {
    reading = false;
  }
}

follow("/v1/admin/events", {
  connected(yes) {
    live.className = yes ? "badge ok" : "badge warn";
    live.firstElementChild.className = yes ? "dot ok" : "dot warn";
    live.lastElementChild.textContent = yes ? "Live" : "Connection lost";
  },
  now: showNow,
  finished: showFinished,
  sums: readFigures,
}, finished.rows[0]?.dataset.request ?? "none");
setInterval(() => document.hidden || readFigures(), 60000);
