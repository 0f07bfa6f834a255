// What scripts of pages share: requests, event streams, times, copying, dialogs, toasts and forms.
// Importing it does nothing by itself; start.js puts it to work on each page.

const prefix = document.body.dataset.prefix ?? "";

/** The address of a path of this box, below the prefix of a proxy. */
export const address = (path) => prefix + path;

// Requests

/** An error that the box answered: its sentence, with `status`, `code` and `param`, which names
 * the field that was wrong, if one was. */
export class Refused extends Error {
  constructor(status, error) {
    super(error.message || `The box answered ${status}.`);
    this.status = status;
    this.code = error.code ?? "";
    this.param = error.param ?? "";
  }
}

/** Send a request, whose body is sent as JSON, or a Blob as it is; answers the response.  Throws
 * Refused, or an Error if the box is not reached.  Where the session has ended, the browser goes to the login and comes back. */
export async function send(method, path, body, { signal, headers = {} } = {}) {
  const sent = { accept: "application/json", ...headers };
  const raw = body instanceof Blob;
  if (body !== undefined) sent["content-type"] = raw ? body.type : "application/json";
  const csrf = document.querySelector("meta[name=csrf-token]")?.content;
  if (csrf) sent["x-csrf-token"] = csrf;
  let response;
  try {
    response = await fetch(address(path), {
      method,
      headers: sent,
      body: raw || body === undefined ? body : JSON.stringify(body),
      credentials: "same-origin",
      signal,
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The box cannot be reached: is it running, and are you connected?");
  }
  if (response.ok) return response;
  let error = {};
  try {
    const content = await response.json();
    error = typeof content.error === "string" ? { message: content.error } : content.error ?? {};
    const place = Array.isArray(content.detail) ? content.detail[0]?.loc : null;
    if (place) error = { ...error, param: place.slice(1).join(".") };
  } catch {
    // a proxy between answered with something else
  }
  const ended = response.status === 401 && csrf && path !== "/v1/session";
  if (ended && error.code !== "login_failed") {
    const here = location.pathname.slice(prefix.length) + location.search;
    location.assign(address(`/login?next=${encodeURIComponent(here)}`));
  }
  throw new Refused(response.status, error);
}

/** Send a request with a JSON body; answers the JSON of the answer, null if it has none. */
export async function call(method, path, body, options) {
  const text = await (await send(method, path, body, options)).text();
  return text ? JSON.parse(text) : null;
}

// Streams

/** The parts of a response's text as they come, each of which ends with `separator`. */
export async function* partsOf(response, separator) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const parts = (rest + value).split(separator);
      rest = parts.pop();
      yield* parts;
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** The events of a response as `{name, data, id}`; `data` is parsed if it is JSON. */
export async function* eventsOf(response) {
  for await (const part of partsOf(response, /\r?\n\r?\n/)) {
    const event = eventFrom(part);
    if (event) yield event;
  }
}

function eventFrom(text) {
  const fields = { event: "message", id: "" };
  const data = [];
  for (const line of text.split(/\r?\n/)) {
    const colon = line.indexOf(":");
    if (colon < 1) continue; // a comment keeps the connection
    const value = line.slice(colon + 1).replace(/^ /, "");
    if (line.startsWith("data:")) data.push(value);
    else fields[line.slice(0, colon)] = value;
  }
  if (!data.length) return null;
  const joined = data.join("\n");
  try {
    return { name: fields.event, id: fields.id, data: JSON.parse(joined) };
  } catch {
    return { name: fields.event, id: fields.id, data: joined };
  }
}

/** Follow the event stream at `path` and call `handlers[name](data)` for each event; after a lost
 * connection it begins again.  `handlers.connected(boolean)` is told whether there is one.  Nothing
 * is followed while the page is not seen.  `lastId` is the id of the last event that is known, after
 * which it goes on.  Answers a function that ends it. */
export function follow(path, handlers, lastId = "") {
  let controller = null;
  let ended = false;
  let delay = 1000;

  async function run() {
    if (controller || ended || document.hidden) return;
    const mine = (controller = new AbortController());
    try {
      const headers = { accept: "text/event-stream" };
      if (lastId) headers["last-event-id"] = lastId;
      const response = await send("GET", path, undefined, { signal: mine.signal, headers });
      handlers.connected?.(true);
      for await (const event of eventsOf(response)) {
        delay = 1000;
        lastId = event.id || lastId;
        handlers[event.name]?.(event.data);
      }
    } catch (error) {
      const given = error instanceof Refused && error.status >= 400 && error.status < 500;
      if (given && error.status !== 429) ended = true; // asking again would not change it
    }
    if (controller === mine) controller = null;
    if (!document.hidden) handlers.connected?.(false);
    if (!ended) setTimeout(run, delay * (0.75 + Math.random() / 2));
    delay = Math.min(delay * 2, 30000);
  }

  function seen() {
    if (document.hidden) controller?.abort();
    else run();
  }
  document.addEventListener("visibilitychange", seen);
  run();
  return () => {
    ended = true;
    controller?.abort();
    document.removeEventListener("visibilitychange", seen);
  };
}

// Elements

export const byId = (id) => document.getElementById(id);

/** An element: `element("a", {href: "/", class: "button"}, "text", otherElement)`.  A property that
 * begins with `on` is a listener; one that is null, undefined or false is left out. */
export function element(name, properties = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else made.setAttribute(key, value === true ? "" : value);
  }
  made.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return made;
}

/** A cell of a table whose rows are cards on a phone. */
export const cell = (label, content, css = null) =>
  element("td", { "data-label": label, class: css }, content);

/** An icon of static/icons.svg. */
export function icon(name) {
  const space = "http://www.w3.org/2000/svg";
  const [svg, use] = [document.createElementNS(space, "svg"), document.createElementNS(space, "use")];
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  use.setAttribute("href", `${document.body.dataset.icons}#${name}`);
  svg.append(use);
  return svg;
}

// Times and numbers

const sameDay = new Intl.DateTimeFormat(undefined, { timeStyle: "medium" });
const sameYear = new Intl.DateTimeFormat(undefined, {
  day: "numeric", month: "short", hour: "2-digit", minute: "2-digit",
});
const anyYear = new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "short" });

const hour = new Intl.DateTimeFormat(undefined, { hour: "2-digit", minute: "2-digit" });

/** A time as people here write it; today's without the day. */
export function localTime(date, now = new Date()) {
  if (date.toDateString() === now.toDateString()) return sameDay.format(date);
  return (date.getFullYear() === now.getFullYear() ? sameYear : anyYear).format(date);
}

/** Write each `<time datetime data-local>` below `root` in local time, with the exact one as its
 * title. */
export function localTimes(root = document) {
  for (const time of root.querySelectorAll("time[data-local]")) {
    const date = new Date(time.dateTime);
    if (Number.isNaN(date.getTime())) continue;
    showTime(time, time.dateTime);
  }
  for (const text of root.querySelectorAll(".chart [data-at]")) {
    const local = hour.format(new Date(text.dataset.at));
    const { label } = text.dataset; // that the text begins with; it is all of it, if there is none
    text.textContent = label ? text.textContent.replace(label, local) : local;
  }
}

/** Write a moment (RFC 3339) into a `<time>`, in local time. */
export function showTime(time, moment) {
  time.dateTime = time.title = moment;
  time.textContent = localTime(new Date(moment));
}

/** `<time>` of Unix milliseconds or an ISO text, in local time. */
export function timeElement(when) {
  const time = element("time");
  showTime(time, new Date(when).toISOString());
  return time;
}

const plain = new Intl.NumberFormat("en-US");
export const number = (value) => plain.format(value);

/** An id shortened in the middle. */
export const shortId = (id) => (id.length > 20 ? `${id.slice(0, 10)}…${id.slice(-6)}` : id);

// Copying

/** Copy a text; true if it worked.  On plain HTTP there is no clipboard API: then a selection is
 * copied. */
export async function copy(text) {
  if (navigator.clipboard && window.isSecureContext) {
    try {
      await navigator.clipboard.writeText(text);
      return true;
    } catch {
      // not permitted: try the other way
    }
  }
  const area = element("textarea", { readonly: true, class: "out-of-sight", "aria-hidden": "true" });
  area.value = text;
  const before = document.activeElement;
  (before?.closest("dialog") ?? document.body).append(area); // a modal dialog makes the rest inert
  area.select();
  let copied = false;
  try {
    copied = document.execCommand("copy");
  } catch {
    copied = false;
  }
  area.remove();
  before?.focus();
  return copied;
}

/** Copy what a button with `data-copy` (a text) or `data-copy-from` (a selector) names, and say so. */
export async function copyByButton(button) {
  const source = button.dataset.copyFrom && document.querySelector(button.dataset.copyFrom);
  const text = source ? source.value ?? source.textContent : button.dataset.copy ?? "";
  if (!(await copy(text))) {
    toast("This browser did not let the page copy: select the text and copy it.", "bad");
    return;
  }
  const use = button.querySelector("use");
  use?.setAttribute("href", use.getAttribute("href").replace(/#.*/, "#check"));
  button.dataset.copied = "";
  toast("Copied.");
  setTimeout(() => {
    use?.setAttribute("href", use.getAttribute("href").replace(/#.*/, "#copy"));
    delete button.dataset.copied;
  }, 1500);
}

/** A button that copies `text`; `what` says what it is. */
export function copyButton(text, what = "") {
  return element(
    "button",
    { type: "button", class: "copy", "data-copy": text, "aria-label": `Copy ${what}`.trim() },
    icon("copy"),
  );
}

/** A shortened id with its copy button. */
export function copyableId(id, what = "id") {
  return element(
    "span", { class: "copyable" }, element("code", { title: id }, shortId(id)), copyButton(id, what),
  );
}

// Dialogs and toasts

/** Say something in the corner, also to screen readers; `kind` "bad" stays for longer. */
export function toast(text, kind = "") {
  const place = byId("toasts");
  if (place.showPopover) { // above a dialog that was opened since
    place.setAttribute("popover", "manual");
    if (place.matches(":popover-open") && document.querySelector("dialog[open]")) place.hidePopover();
    if (!place.matches(":popover-open")) place.showPopover();
  }
  const shown = element("p", { class: `toast ${kind}`.trim() }, text);
  place.append(shown);
  while (place.children.length > 4) place.firstElementChild.remove();
  setTimeout(() => shown.remove(), kind === "bad" ? 9000 : 3500);
}

/** Show a `<dialog>`; answers a promise of what it was closed with, "" if it was left. */
export function showDialog(dialog) {
  return new Promise((resolve) => {
    dialog.returnValue = "";
    dialog.addEventListener("close", () => resolve(dialog.returnValue), { once: true });
    dialog.showModal();
  });
}

/** Ask before something is done that cannot be undone; `action` is the word on the button.  Answers
 * true or false. */
export const sure = (title, text, action) => confirmed(title, text, action, " danger");

/** The same for what does no harm. */
export async function confirmed(title, text, action, kind = "") {
  const dialog = element(
    "dialog",
    { class: "panel", "aria-labelledby": "confirm-title" },
    element("h2", { id: "confirm-title" }, title),
    element(
      "form",
      { method: "dialog", class: "stack" },
      element("p", {}, text),
      element(
        "div",
        { class: "row end" },
        element("button", { class: "button", value: "" }, "Cancel"),
        element("button", { class: `button primary${kind}`, value: "yes" }, action),
      ),
    ),
  );
  document.body.append(dialog);
  const answer = await showDialog(dialog);
  dialog.remove();
  return answer === "yes";
}

// Forms

/** The values of a form by name: numbers of number fields, true or false of check boxes, lists of
 * names that end in `[]`.  Fields that are empty or disabled are left out, but with `data-null`
 * they are null. */
function valuesOf(form) {
  const values = {};
  for (const field of form.elements) {
    const { name, type } = field;
    if (!name || field.disabled || type === "submit" || type === "button") continue;
    if (name.endsWith("[]")) {
      const list = (values[name.slice(0, -2)] ??= []);
      if (type !== "checkbox" || field.checked) list.push(field.value);
    } else if (type === "checkbox") values[name] = field.checked;
    else if (type === "radio") {
      if (field.checked) values[name] = field.value;
    } else if (field.value.trim() === "") {
      if ("null" in field.dataset) values[name] = null;
    } else values[name] = type === "number" ? field.valueAsNumber : field.value;
  }
  return values;
}

/** Call `work(values, form)` when the form is sent.  Meanwhile its button is busy; what `work`
 * throws is shown at the field that it names, or in the form's `.error`. */
export function onSubmit(form, work) {
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const button = event.submitter ?? form.querySelector("[type=submit]");
    if (button?.getAttribute("aria-busy") === "true") return;
    clearErrors(form);
    button?.setAttribute("aria-busy", "true");
    try {
      await work(valuesOf(form), form);
    } catch (error) {
      showError(form, error);
    } finally {
      button?.removeAttribute("aria-busy");
    }
  });
}

/** Throws an error for the field `again`. */
export function checkAgain(password, again) {
  if (again === password) return;
  throw Object.assign(new Error("The two passwords differ."), { param: "again" });
}

export function clearErrors(form) {
  for (const field of form.querySelectorAll("[aria-invalid]")) field.removeAttribute("aria-invalid");
  for (const error of form.querySelectorAll(".error")) error.textContent = "";
}

export function showError(form, error) {
  const field = error.param && form.elements.namedItem(error.param);
  const place = (field && field.closest?.(".field")?.querySelector(".error"))
    || form.querySelector(":scope > .error") || form.querySelector(".error[role=alert]");
  if (field?.setAttribute) {
    field.setAttribute("aria-invalid", "true");
    field.focus();
  }
  if (place) place.textContent = error.message;
  else toast(error.message, "bad");
}
