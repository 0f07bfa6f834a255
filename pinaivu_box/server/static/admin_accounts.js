// The page of accounts.

import { on, onSent, open, refresh } from "./admin.js";
import { byId, call, showTime, sure, toast } from "./page.js";

const pathOf = (id) => `/v1/admin/accounts/${encodeURIComponent(id)}`;

on("create", () => open("create-dialog"));

onSent("create-dialog", async (fields) => {
  const body = { name: fields.get("name").trim(), role: fields.get("role") };
  const account = await call("POST", "/v1/admin/accounts", body);
  if (fields.get("link")) await makeLink(account);
  else toast(`${account.name} is created.`);
  await refresh();
});

on("link", makeLink);

async function makeLink({ id, name }) {
  const link = await call("POST", `${pathOf(id)}/link`);
  const text = `Whoever opens it can log in as ${name} and choose a password.`;
  showLink(`Login link of ${name}`, text, link);
}

on("invite", async () => {
  const link = await call("POST", "/v1/admin/invitations", {});
  showLink("Invitation", "Whoever opens it can create an account.", link);
});

function showLink(title, text, { url, expires_at }) {
  open("link-dialog", { about: title });
  byId("link-for").textContent = text;
  byId("link-text").textContent = url;
  showTime(byId("link-until"), expires_at);
}

byId("link-dialog").addEventListener("close", () => byId("link-text").replaceChildren());

on("password", ({ id, name }) => {
  open("password-dialog", { about: name }).dataset.account = id;
});

onSent("password-dialog", async (fields, dialog) => {
  const body = { password: fields.get("password") };
  const account = await call("PATCH", pathOf(dialog.dataset.account), body);
  toast(`${account.name} has a new password.`);
  await refresh();
});

on("role", async ({ id, name, role }) => {
  const wanted = role === "admin" ? "member" : "admin";
  const text = "An admin sees the usage of all, and can change everything on this box.";
  if (wanted === "admin" && !(await sure(`Make ${name} an admin?`, text, "Make an admin"))) return;
  await call("PATCH", pathOf(id), { role: wanted });
  toast(`${name} is ${wanted === "admin" ? "an admin" : "a member"} now.`);
  await refresh();
});

on("remove", async ({ id, name, keys }) => {
  const revoked = keys === 1 ? "Its key is revoked" : `Its ${keys} keys are revoked`;
  const text = `${keys ? `${revoked}, its` : "Its"} sessions end, and nobody can log in to it any `
    + "more. Its usage and receipts are kept. This cannot be undone.";
  if (!(await sure(`Remove ${name}?`, text, "Remove"))) return;
  await call("DELETE", pathOf(id));
  toast(`${name} is removed.`);
  await refresh();
});
