// What the pages for admins share: what buttons do, forms in dialogs, and regions that are read
// again.
//
// A button with data-action="x" does what `on("x", ...)` says.  The nearest data-item around it
// holds, as JSON, what it is about.  An element with data-region and an id is replaced by the
// server's newest version of it with `refresh`.

import { byId, localTimes, number, onSubmit, toast } from "./page.js";

const actions = new Map();

/** What the nearest data-item around an element is about. */
function itemOf(node) {
  return JSON.parse(node.closest("[data-item]")?.dataset.item ?? "{}");
}

/** `handler(item, button)` is called for each click; what it throws is shown. */
export function on(action, handler) {
  actions.set(action, handler);
}

document.addEventListener("click", async (event) => {
  const button = event.target.closest?.("[data-action]");
  const handler = actions.get(button?.dataset.action);
  if (!handler || button.getAttribute("aria-busy") === "true") return;
  button.setAttribute("aria-busy", "true");
  try {
    await handler(itemOf(button), button);
  } catch (error) {
    if (error.name !== "AbortError") toast(error.message, "bad");
  } finally {
    button.removeAttribute("aria-busy");
  }
});

let opener = null; // of the dialogs that are open: one may open another

function rememberOpener() {
  const focused = document.activeElement;
  if (focused && focused !== document.body && !focused.closest("dialog")) opener = focused;
}

/** Focus what opened a dialog, or what has taken its place since. */
function focusOpener() {
  if (!opener || document.querySelector("dialog[open]")) return;
  const focused = document.activeElement; // still in the dialog, if its opener is gone
  if (focused && focused !== document.body && !focused.closest("dialog")) return;
  (opener.isConnected ? opener : byId(opener.id) ?? byId("content")).focus();
}

/** Open a dialog with its form as it was at first but for the values in `fill`; `about` is named in
 * its title.  Answers the dialog. */
export function open(id, { about = "", fill = {} } = {}) {
  const dialog = byId(id);
  const form = dialog.querySelector("form");
  form?.reset();
  for (const place of dialog.querySelectorAll("[data-about]")) place.textContent = about;
  for (const place of dialog.querySelectorAll(".error")) place.textContent = "";
  for (const field of form?.elements ?? []) {
    if (!(field.name in fill)) continue;
    const value = fill[field.name];
    if (field.type !== "checkbox") field.value = value ?? "";
    else field.checked = Array.isArray(value) ? value.includes(field.value) : Boolean(value);
  }
  rememberOpener();
  dialog.addEventListener("close", focusOpener, { once: true });
  dialog.showModal();
  return dialog;
}

/** `handler(fields, dialog)` is called when the form in a dialog is sent; then the dialog closes,
 * unless that throws. */
export function onSent(id, handler) {
  const dialog = byId(id);
  const form = dialog?.querySelector("form");
  if (!form) return;
  onSubmit(form, async () => {
    await handler(new FormData(form), dialog);
    dialog.close();
  });
}

/** Read the page again, and replace what has changed of its regions.  What was done before it is
 * done, so that it fails is only told. */
export async function refresh() {
  await read().catch(() => toast("The page could not be read again: reload it.", "bad"));
}

async function read() {
  const answer = await fetch(location.href, { headers: { accept: "text/html" } });
  if (answer.redirected) return location.reload(); // to the login
  if (!answer.ok) throw new Error("the page could not be read");
  const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
  for (const region of document.querySelectorAll("[data-region]")) {
    const other = fresh.getElementById(region.id);
    if (other) replace(region, other);
  }
}

function replace(region, other) {
  if (other.dataset.item) region.dataset.item = other.dataset.item;
  const seen = other.innerHTML; // as the server wrote it, to compare only
  if (region.seen === seen) return;
  region.seen = seen;
  for (const details of region.querySelectorAll("details[id][open]")) {
    other.querySelector(`#${CSS.escape(details.id)}`)?.setAttribute("open", "");
  }
  const focused = region.contains(document.activeElement) ? document.activeElement.id : null;
  region.replaceChildren(...document.adoptNode(other).childNodes);
  localTimes(region);
  if (focused !== null) {
    (byId(focused) ?? region.querySelector("a[href], button:enabled, [tabindex='0']"))?.focus();
  }
}

/** Refresh every so many seconds while somebody looks at the page and is not in the middle of
 * something. */
export function live(seconds) {
  let reading = false;
  setInterval(async () => {
    const selecting = !(getSelection()?.isCollapsed ?? true);
    if (document.hidden || reading || selecting || document.querySelector("dialog[open]")) return;
    reading = true;
    await read().catch(() => {}); // the next time
    reading = false;
  }, seconds * 1000);
}

// What fields hold

/** Texts with commas between them. */
export const listOf = (text) =>
  String(text ?? "").split(",").map((part) => part.trim()).filter(Boolean);

/** A number; null if the field is empty. */
export const numberOf = (text) => (String(text ?? "").trim() === "" ? null : Number(text));

/** `1 request`, `2 requests`. */
export const counted = (count, noun) => `${number(count)} ${noun}${count === 1 ? "" : "s"}`;

/** A text; null if the field is empty. */
export const textOf = (text) => String(text ?? "").trim() || null;

const SIZES = [[1e12, "TB"], [1e9, "GB"], [1e6, "MB"], [1e3, "kB"]];

/** Bytes as `1.25 GB`. */
export function sizeText(bytes) {
  const [unit, name] = SIZES.find(([each]) => bytes >= each * 0.9995) ?? [1, "B"];
  return `${Number((bytes / unit).toPrecision(3))} ${name}`;
}
