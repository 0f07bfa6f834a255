// API Keys: create, edit, rotate and revoke the account's own keys.

import { address, byId, call, clearErrors, onSubmit, showDialog, sure, toast } from "./page.js";

const form = (id) => byId(id).querySelector("form");
let chosen = null; // the row of the key that a dialog is about

/** The policy of a form; null stands for as much as the account may have.  `kept` are scopes that the
 * key has and the form has not. */
function policyOf({ rpm, tpm, max_parallel, amount, period, models, scopes }, form, kept = []) {
  const budget = amount === null ? null : { amount: amount.trim().replace(",", "."), ...(period && { period }) };
  const globs = (models ?? "").split(",").map((name) => name.trim()).filter(Boolean);
  if (scopes.every((scope) => scope === "local-only")) {
    throw new Error("Choose at least one thing that the key may do.");
  }
  const always = form.querySelector("[data-local-only]").dataset.localOnly ? ["local-only"] : [];
  return {
    rpm, tpm, max_parallel, budget,
    models: globs.length ? globs : null,
    scopes: [...new Set([...scopes, ...always, ...kept])],
  };
}

/** The end of a day here. */
const endOf = (day) => new Date(`${day}T23:59:59`).toISOString();

/** The day of a time here, as a date field has it. */
function dayOf(time) {
  if (!time) return "";
  const moment = new Date(time);
  return new Date(moment - moment.getTimezoneOffset() * 60_000).toISOString().slice(0, 10);
}

function withoutNull(values) {
  return Object.fromEntries(Object.entries(values).filter(([, value]) => value !== null));
}

/** Errors name fields of the request: those of the form are called as their last part. */
async function asked(work) {
  try {
    return await work();
  } catch (error) {
    if (error.param) error.param = error.param === "policy.budget" ? "amount" : error.param.split(".").pop();
    throw error;
  }
}

async function showSecret(made) {
  byId("secret-text").textContent = made.key;
  byId("secret-export").textContent = `export PINAIVU_API_KEY="${made.key}"`;
  const warning = byId("secret-warning");
  warning.textContent = made.warning ?? "";
  warning.hidden = !made.warning;
  await showDialog(byId("secret"));
  byId("secret-text").textContent = "";
  byId("secret-export").textContent = "";
  location.reload();
}

onSubmit(form("create"), async (values) => {
  const body = { name: values.name ?? "", policy: withoutNull(policyOf(values, form("create"))) };
  if (values.expires_at) body.expires_at = endOf(values.expires_at);
  const made = await asked(() => call("POST", "/v1/account/keys", body));
  byId("create").close();
  form("create").reset();
  await showSecret(made);
});

onSubmit(form("edit"), async (values) => {
  const body = { name: values.name ?? "", policy: policyOf(values, form("edit"), unseenScopes()) };
  const day = values.expires_at ?? "";
  if (day !== dayOf(chosen.dataset.expires)) body.expires_at = day ? endOf(day) : null;
  await asked(() => call("PATCH", `/v1/account/keys/${chosen.dataset.key}`, body));
  location.reload();
});

onSubmit(form("rotate"), async ({ overlap }) => {
  const path = `/v1/account/keys/${chosen.dataset.key}/rotate`;
  const made = await call("POST", path, { overlap });
  byId("rotate").close();
  await showSecret(made);
});

/** Scopes of the chosen key that only an admin can give. */
function unseenScopes() {
  const seen = [...form("edit").querySelectorAll("[name='scopes[]']")].map((box) => box.value);
  return JSON.parse(chosen.dataset.policy).scopes.filter((scope) => !seen.includes(scope));
}

function edit() {
  const fields = form("edit").elements;
  clearErrors(form("edit"));
  fields.name.value = chosen.dataset.ownName;
  const policy = JSON.parse(chosen.dataset.policy);
  for (const name of ["rpm", "tpm", "max_parallel", "amount"]) fields[name].value = policy[name] ?? "";
  fields.models.value = policy.models.join(", ");
  fields.expires_at.value = dayOf(chosen.dataset.expires);
  for (const box of form("edit").querySelectorAll("[name='scopes[]']")) {
    box.checked = policy.scopes.includes(box.value);
  }
  const period = policy.period ?? "";
  if (![...fields.period.options].some((option) => option.value === period)) {
    fields.period.add(new Option(`every ${period}`, period));
  }
  fields.period.value = period;
  showDialog(byId("edit"));
}

async function revoke() {
  const text = `Programs that use “${chosen.dataset.name}” are refused from now on, for ever. What `
    + "they run now is stopped.";
  if (!(await sure("Revoke the key?", text, "Revoke"))) return;
  try {
    await call("POST", `/v1/account/keys/${chosen.dataset.key}/revoke?now=true`);
    location.assign(address("/keys"));
  } catch (error) {
    toast(error.message, "bad");
  }
}

document.addEventListener("click", (event) => {
  const button = event.target.closest?.("[data-action]");
  if (!button) return;
  chosen = button.closest("[data-key]");
  if (button.dataset.action === "edit") edit();
  else if (button.dataset.action === "rotate") {
    clearErrors(form("rotate"));
    showDialog(byId("rotate"));
  } else revoke();
});
