// The page of keys.

import { counted, on, onSent, open, refresh, textOf } from "./admin.js";
import { expiryOf, fieldsOf, localText, policyOf } from "./key_settings.js";
import { byId, call, cell, copyButton, element, toast } from "./page.js";

const label = (key) => key.name || `${key.prefix}…${key.last_four}`;
const pathOf = (id) => `/v1/admin/keys/${encodeURIComponent(id)}`;

/** Without the fields that are null, which only changes may have. */
const given = (fields) =>
  Object.fromEntries(Object.entries(fields).filter(([, value]) => value !== null));

// Creating

on("create", () => open("create-dialog"));

onSent("create-dialog", async (fields) => {
  const names = fields.get("names").split("\n").map((name) => name.trim()).filter(Boolean);
  const account = textOf(fields.get("account"));
  const expires_at = expiryOf(fields);
  const body = { policy: given(policyOf(fields)), ...given({ account, expires_at }) };
  const made = [];
  let failure = "";
  for (const name of names.length ? names : [""]) {
    try {
      made.push(await call("POST", "/v1/admin/keys", { ...body, name }));
    } catch (error) {
      if (!made.length) throw error;
      failure = `${name} got no key, and nor did those after it: ${error.message}`;
      break;
    }
  }
  showSecrets(made, failure);
  await refresh();
});

let shown = []; // the keys whose secrets are shown

function showSecrets(keys, failure = "") {
  shown = keys;
  open("secrets-dialog", { about: keys.length > 1 ? "secrets" : "secret" });
  byId("secrets-csv").hidden = keys.length < 2;
  byId("secrets-failure").textContent = failure || keys.find((key) => key.warning)?.warning || "";
  const rows = keys.map((key) =>
    element(
      "tr", {},
      cell("Name", element("bdi", {}, key.name || "no name")),
      cell("Account", element("bdi", {}, key.account)),
      cell("Secret", [
        element("code", {}, key.key), copyButton(key.key, `the secret of ${label(key)}`),
      ]),
    ));
  byId("secrets").replaceChildren(...rows);
}

byId("secrets-dialog").addEventListener("close", () => {
  shown = [];
  byId("secrets").replaceChildren();
});

/** A cell of CSV; what a spreadsheet would run as a formula is text. */
function csvCell(text) {
  const isFormula = /^\s*[=+@\-\uff1d\uff0b\uff20\uff0d]|[\t\r\n]/.test(text);
  const safe = isFormula ? `'${text}` : text;
  return /[",\r\n]/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
}

on("csv", () => {
  const lines = shown.map((key) => [key.name, key.account, key.key]);
  const text = [["name", "account", "key"], ...lines]
    .map((line) => `${line.map(csvCell).join(",")}\r\n`)
    .join("");
  const url = URL.createObjectURL(new Blob([text], { type: "text/csv" }));
  element("a", { href: url, download: "keys.csv" }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
});

// Changing

on("edit", (key) => {
  const dialog = open("edit-dialog", { about: label(key), fill: fieldsOf(key) });
  dialog.dataset.key = key.id;
  dialog.dataset.expires = localText(key.expires_at);
});

onSent("edit-dialog", async (fields, dialog) => {
  const body = { name: fields.get("name"), policy: policyOf(fields) };
  if ((fields.get("expires_at") ?? "") !== dialog.dataset.expires) {
    body.expires_at = expiryOf(fields);
  }
  const key = await call("PATCH", pathOf(dialog.dataset.key), body);
  toast(key.warning ?? `${label(key)} is changed.`);
  await refresh();
});

for (const action of ["rotate", "block", "revoke"]) {
  on(action, (key) => {
    open(`${action}-dialog`, { about: label(key) }).dataset.key = key.id;
  });
}

onSent("rotate-dialog", async (fields, dialog) => {
  const body = { overlap: fields.get("overlap") };
  showSecrets([await call("POST", `${pathOf(dialog.dataset.key)}/rotate`, body)]);
  await refresh();
});

const now = (fields) => (fields.get("now") ? "?now=true" : "");
const stopped = (key) => (key.stopped ? `, and ${counted(key.stopped, "running request")} ${key.stopped === 1 ? "was" : "were"} stopped` : "");

onSent("block-dialog", async (fields, dialog) => {
  const body = { blocked: fields.get("blocked").trim() };
  const key = await call("PATCH", pathOf(dialog.dataset.key) + now(fields), body);
  toast(`${label(key)} is blocked${stopped(key)}.`);
  await refresh();
});

on("unblock", async ({ id }) => {
  const key = await call("PATCH", pathOf(id), { blocked: null });
  toast(`${label(key)} works again.`);
  await refresh();
});

onSent("revoke-dialog", async (fields, dialog) => {
  const key = await call("POST", `${pathOf(dialog.dataset.key)}/revoke${now(fields)}`);
  toast(`${label(key)} is revoked${stopped(key)}.`);
  await refresh();
});
