// The page /memories.

import {
  byId, call, element as el, icon, onSubmit, showError, sure, timeElement, toast,
} from "./page.js";

const path = (id) => `/v1/memories/${encodeURIComponent(id)}`;
const ORIGINS = {
  added: "Added by you",
  said: "You asked to remember it",
  found: "From a conversation",
  imported: "Imported",
};
let memories = [];

async function load() {
  try {
    const list = await call("GET", "/v1/memories");
    memories = list.data;
    byId("enabled").checked = list.enabled;
    byId("how").textContent =
      list.search === "embeddings"
        ? "Memories are found by their meaning, with an embedding model of this box."
        : "Memories are found by their words; with an embedding model on this box they would be found by meaning.";
    byId("problem").hidden = true;
  } catch (error) {
    byId("problem").querySelector("[data-sentence]").textContent = error.message;
    byId("problem").hidden = false;
  }
  show();
}

function show() {
  const words = byId("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
  const matches = (memory) => words.every((word) => memory.text.toLowerCase().includes(word));
  const shown = memories.filter(matches);
  byId("list").replaceChildren(...shown.map(row));
  byId("count").textContent = memories.length ? String(memories.length) : "";
  byId("none").hidden = memories.length > 0;
}

function row(memory) {
  const button = (name, label, onclick, more) =>
    el("button", { type: "button", class: `button quiet small icon-only ${more ?? ""}`, "aria-label": `${label}: ${memory.text.slice(0, 60)}`, title: label, onclick, "data-testid": label.toLowerCase() }, icon(name));
  const item = el(
    "li",
    { class: "memory", "data-testid": "memory" },
    el("p", { dir: "auto" }, memory.text),
    el("span", { class: "hint" }, `${ORIGINS[memory.origin] ?? ""} · `, timeElement(memory.updated_at)),
    el("span", { class: "row" }, button("pencil", "Edit", () => edit(item, memory)), button("trash", "Delete", () => remove(memory))),
  );
  return item;
}

function edit(item, memory) {
  const field = el("input", { name: "text", maxlength: "500", required: true, dir: "auto", "aria-label": "Memory", "data-testid": "memory-text" });
  field.value = memory.text;
  const form = el(
    "form",
    {},
    field,
    el("button", { type: "submit", class: "button primary small", "data-testid": "save" }, "Save"),
    el("button", { type: "button", class: "button small", onclick: show }, "Cancel"),
    el("p", { class: "error", role: "alert" }),
  );
  onSubmit(form, async ({ text }) => {
    const changed = await call("PATCH", path(memory.id), { text });
    memories = memories.map((other) => (other.id === memory.id ? changed : other));
    show();
  });
  form.addEventListener("keydown", (event) => {
    if (event.key === "Escape") show();
  });
  item.replaceChildren(form);
  field.focus();
}

async function remove(memory) {
  const text = `“\u2068${memory.text}\u2069” will be gone for good.`;
  if (!(await sure("Delete this memory?", text, "Delete"))) return;
  try {
    await call("DELETE", path(memory.id));
    memories = memories.filter((other) => other.id !== memory.id);
    show();
  } catch (error) {
    toast(error.message, "bad");
  }
}

onSubmit(byId("add"), async ({ text }, form) => {
  const added = await call("POST", "/v1/memories", { text });
  memories = [added, ...memories.filter((other) => other.id !== added.id)];
  form.reset();
  show();
  form.elements.text.focus();
});
byId("filter").addEventListener("input", show);
byId("enabled").addEventListener("change", async (event) => {
  const box = event.target;
  try {
    await call("PATCH", "/v1/memories", { enabled: box.checked });
    toast(box.checked ? "Memories are on." : "Memories are off: nothing is used or added.");
  } catch (error) {
    box.checked = !box.checked;
    showError(byId("add"), error);
  }
});
if (byId("memories-page").dataset.locked === "no") load();
