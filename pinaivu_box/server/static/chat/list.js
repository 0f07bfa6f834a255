// The list of conversations: searched, grouped by day, with a menu for each.

import { address, byId, element as el, icon, showDialog, sure } from "../page.js";
import { dayOf } from "./days.js";
import { debounced, isolated } from "./parts.js";

export class ConversationList {
  /** `on`: open(id), renamed(conversation), deleted(id), failed(error). */
  constructor(api, on) {
    this.api = api;
    this.on = on;
    this.element = byId("conversations");
    this.search = byId("search");
    this.more = byId("more-conversations");
    this.items = [];
    this.next = null;
    this.searchedAll = true;
    this.current = null;
    this.asked = 0; // only the answer to the last question is shown
    this.search.addEventListener("input", debounced(200, () => this.load()));
    this.more.addEventListener("click", () => this.load(this.next));
  }

  async load(after = null) {
    const asked = ++this.asked;
    try {
      const page = await this.api.conversations(this.search.value.trim(), after);
      if (asked !== this.asked) return;
      this.items = after === null ? page.data : [...this.items, ...page.data];
      this.next = page.next;
      this.searchedAll = page.searched_all;
      this.show();
    } catch (error) {
      this.on.failed(error);
    }
  }

  select(id) {
    this.current = id;
    for (const link of this.element.querySelectorAll("a.conversation")) {
      if (link.dataset.id === id) link.setAttribute("aria-current", "page");
      else link.removeAttribute("aria-current");
    }
  }

  /** A conversation that is new, or has changed: it is the newest now. */
  touch(conversation) {
    this.items = [conversation, ...this.items.filter((item) => item.id !== conversation.id)];
    this.show();
  }

  replace(conversation) {
    this.items = this.items.map((item) => (item.id === conversation.id ? conversation : item));
    this.show();
  }

  show() {
    const groups = new Map();
    for (const item of this.items) {
      const day = dayOf(item.updated_at);
      groups.set(day, [...(groups.get(day) ?? []), item]);
    }
    const shown = [...groups].map(([day, items]) =>
      el("section", {}, el("h2", {}, day), el("ul", {}, items.map((item) => this.row(item)))),
    );
    if (!shown.length) {
      shown.push(el("p", { class: "muted nothing" }, this.whyNothing()));
    }
    this.element.replaceChildren(...shown);
    this.more.hidden = this.next === null;
    this.more.textContent = this.searchedAll ? "Show older" : "Search older";
    this.select(this.current);
  }

  whyNothing() {
    if (!this.search.value.trim()) return "Your conversations will be here.";
    return this.searchedAll
      ? "No conversation has these words."
      : "Not found so far, and older conversations have not been searched yet.";
  }

  row(item) {
    const title = item.title || "New chat";
    const open = (event) => {
      if (event.metaKey || event.ctrlKey || event.shiftKey || event.button) return;
      event.preventDefault();
      this.on.open(item.id);
    };
    const href = address(`/chat/${encodeURIComponent(item.id)}`);
    const menu = el(
      "details",
      { class: "options" },
      el("summary", { "aria-label": `Options of ${title}`, title: "Options" }, icon("more")),
      el("div", { class: "options-list" }, this.menuItems(item)),
    );
    return el(
      "li",
      { class: "conversation-row", "data-testid": "conversation" },
      el("a", { class: "conversation", href, "data-id": item.id, onclick: open, title }, isolated(title)),
      menu,
    );
  }

  menuItems(item) {
    const action = (label, onclick, more = {}) => el("button", { type: "button", onclick, ...more }, label);
    const exported = (format, label) =>
      el("a", { href: this.api.exportAddress(item.id, format), download: true }, label);
    return [
      action("Rename", () => this.rename(item), { "data-testid": "rename" }),
      exported("markdown", "Export as Markdown"),
      exported("json", "Export as JSON"),
      action("Delete", () => this.remove(item), { class: "danger", "data-testid": "delete" }),
    ];
  }

  async rename(item) {
    const dialog = byId("rename");
    const field = dialog.querySelector("input");
    field.value = item.title;
    setTimeout(() => field.select());
    if ((await showDialog(dialog)) !== "save" || !field.value.trim()) return;
    try {
      const changed = await this.api.change(item.id, { title: field.value.trim() });
      this.replace({ ...item, title: changed.title });
      this.on.renamed(changed);
    } catch (error) {
      this.on.failed(error);
    }
  }

  async remove(item) {
    const text = `“\u2068${item.title || "New chat"}\u2069” and all its messages will be gone for good. Its receipts stay, without the words.`;
    if (!(await sure("Delete the conversation?", text, "Delete"))) return;
    try {
      await this.api.remove(item.id);
      this.items = this.items.filter((other) => other.id !== item.id);
      this.show();
      this.on.deleted(item.id);
    } catch (error) {
      this.on.failed(error);
    }
  }
}

// A click elsewhere, or Escape, closes a menu.
document.addEventListener("click", (event) => {
  for (const menu of document.querySelectorAll("details.options[open], details.used[open]")) {
    if (!menu.contains(event.target) || event.target.closest(".options-list")) menu.open = false;
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  for (const menu of document.querySelectorAll("details.options[open], details.used[open]")) {
    menu.open = false;
    menu.querySelector("summary").focus();
    event.stopImmediatePropagation();
  }
});
