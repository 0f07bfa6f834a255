// The page of peers.

import { listOf, live, numberOf, on, onSent, open, refresh, textOf } from "./admin.js";
import { byId, call, showTime, sure, toast } from "./page.js";

const pathOf = (id) => `/v1/admin/peers/${encodeURIComponent(id)}`;

// Inviting

on("invite", () => open("invite-dialog"));

onSent("invite-dialog", async (fields) => {
  const made = await call("POST", "/v1/admin/peers/invitations", {
    name: textOf(fields.get("name")),
    expires: fields.get("expires").trim(),
    uses: numberOf(fields.get("uses")),
    admin: fields.get("admin") === "on",
    qr: true,
  });
  open("ticket-dialog");
  byId("ticket-text").textContent = made.ticket;
  showTime(byId("ticket-until"), made.expires_at);
  byId("ticket-qr").replaceChildren(drawingOf(made.qr));
  await refresh();
});

/** The code that the server has drawn. */
function drawingOf(svg) {
  const drawing = new DOMParser().parseFromString(svg, "image/svg+xml").documentElement;
  drawing.setAttribute("role", "img");
  drawing.setAttribute("aria-label", "The ticket as a QR code");
  return document.adoptNode(drawing);
}

byId("ticket-dialog").addEventListener("close", () => {
  byId("ticket-text").replaceChildren();
  byId("ticket-qr").replaceChildren();
});

// Joining and leaving

on("join", () => open("join-dialog"));

onSent("join-dialog", async (fields) => {
  const at = textOf(fields.get("at"));
  const body = { ticket: fields.get("ticket").trim(), ...(at ? { at: [at] } : {}) };
  const inviter = await call("POST", "/v1/admin/peers", body);
  toast(`This box is in the network of ${inviter.name}.`);
  location.reload();
});

on("leave", async () => {
  const text = "The other boxes serve this one no requests any more. What it owes, and what it is "
    + "owed, stays on record.";
  if (!(await sure("Leave the network?", text, "Leave"))) return;
  await call("POST", "/v1/admin/peers/leave");
  location.reload();
});

// One peer

on("edit", ({ id, name, limits }) => {
  const fill = { ...limits, name, models: limits.models?.join(", ") };
  const dialog = open("edit-dialog", { about: name, fill });
  dialog.dataset.peer = id;
  dialog.dataset.name = name;
});

onSent("edit-dialog", async (fields, dialog) => {
  const models = listOf(fields.get("models"));
  const name = textOf(fields.get("name"));
  const limits = {
    max_parallel: numberOf(fields.get("max_parallel")),
    tokens_per_minute: numberOf(fields.get("tokens_per_minute")),
    credit_limit: textOf(fields.get("credit_limit")),
    hours: textOf(fields.get("hours")),
    models: models.length ? models : null,
    blocked: textOf(fields.get("blocked")),
  };
  const body = name === dialog.dataset.name ? { limits } : { name, limits };
  const peer = await call("PATCH", pathOf(dialog.dataset.peer), body);
  toast(`${peer.name} is changed.`);
  await refresh();
});

on("revoke", ({ id, name }) => {
  open("revoke-dialog", { about: name }).dataset.peer = id;
});

onSent("revoke-dialog", async (fields, dialog) => {
  const body = { reason: fields.get("reason").trim() };
  const peer = await call("DELETE", pathOf(dialog.dataset.peer), body);
  toast(`${peer.name} is revoked.`);
  await refresh();
});

on("settle", async ({ id, name }) => {
  const path = `/v1/admin/ledger/${encodeURIComponent(id)}/settle`;
  const { differences, statements } = await call("POST", path);
  if (differences.length) {
    const count = differences.length;
    const what = count === 1 ? "1 entry differs" : `${count} entries differ`;
    toast(`${what} with ${name}: until the boxes agree, nothing more can be settled.`, "bad");
  } else if (statements.length) {
    const count = statements.length === 1 ? "a statement" : `${statements.length} statements`;
    toast(`Both boxes have signed ${count}.`);
  } else {
    toast(`There was nothing to settle with ${name}.`);
  }
  await refresh();
});

live(5);
