// Searching the Hugging Face Hub.  It is asked only when somebody presses the button for it.

import { on, open } from "./admin.js";
import { byId, call, cell, element, number, toast } from "./page.js";

const panel = byId("hub");
const billions = (count) => (count ? `${Number((count / 1e9).toPrecision(3))} B` : "-");

on("hub", async () => {
  const words = byId("words").value.trim();
  if (!words) {
    byId("words").focus();
    return toast("Write some words of a name first.", "bad");
  }
  const found = await call("GET", `/v1/admin/models/hub?q=${encodeURIComponent(words)}`);
  byId("hub-words").textContent = words;
  byId("hub-empty").hidden = found.data.length > 0;
  panel.querySelector(".scroll").hidden = found.data.length === 0;
  panel.querySelector("tbody").replaceChildren(...found.data.map(row));
  panel.hidden = false;
  byId("hub-title").focus();
});

// Which of its quantisations it shall be can still be said.
on("pull-found", ({ model }) => open("pull-dialog", { fill: { model } }));

function row(model) {
  const about = [model.architecture, model.context ? `context ${number(model.context)}` : ""];
  const pull = model.served
    ? element("span", { class: "badge ok" }, "here")
    : element(
      "button",
      {
        type: "button", class: "button quiet small", "data-action": "pull-found",
        "aria-label": `Pull ${model.name}`,
      },
      "Pull",
    );
  return element(
    "tr", { "data-item": JSON.stringify({ model: model.name }) },
    element(
      "th", { scope: "row" }, element("bdi", {}, model.name),
      element("div", { class: "muted small" }, about.filter(Boolean).join(" · ")),
    ),
    cell("Parameters", billions(model.parameters), "numeric"),
    cell("Downloads", number(model.downloads), "numeric"),
    cell("Licence", element(
      "span", { class: "pile" }, element("bdi", {}, model.license || "unknown"),
      model.gated ? element("span", { class: "warn small" }, "terms to accept there") : null,
    )),
    element("td", { class: "actions" }, pull),
  );
}
