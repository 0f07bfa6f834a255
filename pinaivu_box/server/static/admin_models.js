// The pages of models: the list, and one model.

import { live, numberOf, on, onSent, open, refresh, sizeText, textOf } from "./admin.js";
import { address, byId, call, element, number, sure, toast } from "./page.js";
import "./admin_hub.js";
import "./admin_loaded.js";
import "./admin_pulls.js";

on("load", async ({ model }) => {
  toast(`Loading ${model} …`);
  const loaded = await call("POST", "/v1/admin/models/load", { model });
  toast(`${loaded.model} is loaded: ${sizeText(loaded.memory)} on ${loaded.device}.`);
  await refresh();
});

on("delete", async ({ model, leave }) => {
  const text = "Its files are deleted. Requests that run finish, and new ones are refused.";
  if (!(await sure(`Delete ${model}?`, text, "Delete"))) return;
  const removed = await call("POST", "/v1/admin/models/delete", { model });
  if (leave) return location.assign(address("/admin/models"));
  toast(`${removed.model} is gone${removed.size ? `, ${sizeText(removed.size)} are free` : ""}.`);
  await refresh();
});

on("remove-alias", async ({ model }) => {
  if (!(await sure(`Remove the alias ${model}?`, "The model itself stays.", "Remove"))) return;
  await call("POST", "/v1/admin/models/delete", { model });
  await refresh();
});

on("alias", ({ model }) => {
  open("alias-dialog", { about: model }).dataset.model = model;
});

onSent("alias-dialog", async (fields, dialog) => {
  const destination = fields.get("destination").trim();
  await call("POST", "/v1/admin/models/copy", { source: dialog.dataset.model, destination });
  toast(`${destination} leads to ${dialog.dataset.model}.`);
  await refresh();
});

on("fit", async ({ model }) => {
  const { fit } = await call("POST", "/v1/admin/models/show", { model, fit: true });
  byId("fit").replaceChildren(...(fit ? fitParts(fit) : ["It is not on this box."]));
  byId("fit").scrollIntoView({ block: "nearest" });
});

function fitParts(fit) {
  const verdict = element(
    "p", {}, element("strong", {}, fit.fits ? "It fits. " : "It does not fit. "), fit.why,
  );
  if (!fit.fits) return [verdict];
  const columns = ["Device", "Layers", "Weights", "KV cache", "Compute", "In all", "Left"];
  const head = columns.map((text, place) =>
    element("th", { scope: "col", class: place ? "numeric" : null }, text));
  const rows = fit.devices.map((device) => {
    const sizes = ["weights", "cache", "compute", "total", "left"];
    const figures = [String(device.layers), ...sizes.map((name) => sizeText(device[name]))];
    return element(
      "tr", {},
      element("td", {}, element("code", {}, device.device)),
      figures.map((text) => element("td", { class: "numeric" }, text)),
    );
  });
  const table = element(
    "table", { class: "data" },
    element("thead", {}, element("tr", {}, head)), element("tbody", {}, rows),
  );
  const label = "Where it would go";
  return [
    verdict,
    fit.instead_of.length
      ? element("p", {}, `Unloaded for it: ${fit.instead_of.join(", ")}.`)
      : "",
    element("p", { class: "muted" },
      `Context of ${number(fit.context)} tokens, ${fit.parallel} requests at the same time.`),
    element("div", { class: "scroll", role: "region", "aria-label": label, tabindex: "0" }, table),
  ];
}

const choiceOf = (value) => (value === undefined ? "" : value ? "yes" : "no");
const switchOf = (text) => (text === "" ? null : text === "yes");

on("settings", ({ model, overrides }) => {
  const { sampling = {}, pin, preload, ...others } = overrides;
  const fill = {
    keep_alive: "", context: "", parallel: "", kv_type: "", gpu_layers: "", ...others, ...sampling,
    pin: choiceOf(pin), preload: choiceOf(preload),
  };
  open("settings-dialog", { fill }).dataset.model = model;
});

onSent("settings-dialog", async (fields, dialog) => {
  const layers = textOf(fields.get("gpu_layers"));
  const settings = {
    keep_alive: textOf(fields.get("keep_alive")),
    pin: switchOf(fields.get("pin")),
    preload: switchOf(fields.get("preload")),
    context: numberOf(fields.get("context")),
    parallel: numberOf(fields.get("parallel")),
    kv_type: textOf(fields.get("kv_type")),
    gpu_layers: layers === "auto" ? layers : numberOf(layers),
    sampling: Object.fromEntries(
      ["temperature", "top_p", "top_k", "min_p"].map((name) => [name, numberOf(fields.get(name))]),
    ),
  };
  await set({ model: dialog.dataset.model, settings });
});

on("reset-settings", async ({ model }) => {
  const text = "All parameters that were set here are as configured again.";
  if (await sure("Reset the parameters?", text, "Reset")) await set({ model, reset: true });
});

async function set(body) {
  try {
    const { model, reload } = await call("POST", "/v1/admin/models/set", body);
    const later = reload.length ? ` ${reload.join(", ")}: once it is loaded again.` : "";
    toast(`The parameters of ${model} are changed.${later}`);
  } catch (error) {
    if (error.param) error.param = error.param.split(".").pop(); // as the field is called
    throw error;
  }
  await refresh();
}

live(5);
