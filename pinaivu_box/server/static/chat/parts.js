// Small parts that the chat's modules share, made with those of page.js.

import { element, icon } from "../page.js";

/** A button with an icon, whose name is read out and shown as a tooltip. */
export function iconButton(name, label, onclick, more = {}) {
  const attributes = { type: "button", class: "tool", "aria-label": label, title: label };
  return element("button", { ...attributes, onclick, ...more }, icon(name));
}

/** Text that others chose: its direction cannot reach beyond it. */
export function isolated(text, attributes = {}) {
  return element("bdi", attributes, text);
}

/** Shows for a moment on a button that it has done something. */
export function flash(button, content) {
  if (button.dataset.flashing) return;
  button.dataset.flashing = "";
  const before = [...button.childNodes];
  button.replaceChildren(content);
  setTimeout(() => {
    button.replaceChildren(...before);
    delete button.dataset.flashing;
  }, 1500);
}

/** Calls `action` once, some milliseconds after the last call. */
export function debounced(milliseconds, action) {
  let timer = 0;
  return (...values) => {
    clearTimeout(timer);
    timer = setTimeout(() => action(...values), milliseconds);
  };
}
