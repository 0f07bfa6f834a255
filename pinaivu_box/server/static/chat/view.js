// One message of a conversation as elements.  HTML comes from the server's renderer alone.

import { preview } from "./attachments.js";
import { address, copy, element as el, icon } from "../page.js";
import { flash, iconButton, isolated } from "./parts.js";
import { visible } from "./visible.js";

// Where text that is added to an open block goes: into its last part.
const PARTS = new Set(["UL", "OL", "LI", "P", "BLOCKQUOTE", "DIV", "TABLE", "TBODY", "TR", "TD", "TH", "PRE"]);

export class MessageView {
  /** `actions` has what its buttons do: edit(message, text), again(message), branch(id). */
  constructor(message, siblings, actions) {
    this.message = message;
    this.html = ""; // of the blocks that are done
    this.siblings = siblings;
    this.actions = actions;
    this.waits = false;
    this.isAnswer = message.role === "assistant";
    this.done = el("div", { class: "done" });
    this.open = el("div", { class: "open", "aria-live": "off" });
    this.thoughtsText = el("div", { class: "thoughts-text" });
    this.thoughts = el(
      "details",
      { class: "thoughts", hidden: true, "data-testid": "thoughts" },
      el("summary", {}, "Thoughts"),
      this.thoughtsText,
    );
    this.text = el("div", { class: this.isAnswer ? "md" : "said" });
    this.problem = el("div", { class: "problem", hidden: true });
    this.foot = el("footer", { class: "under" });
    this.element = el(
      "article",
      {
        class: `message ${message.role}`,
        "data-testid": "message",
        "data-role": message.role,
        "data-status": message.status,
        "data-id": message.id,
        "aria-label": this.isAnswer ? "Answer" : "You",
      },
      this.thoughts,
      this.text,
      this.problem,
      this.foot,
    );
    this.show(message);
  }

  show(message) {
    this.message = message;
    this.element.dataset.status = message.status;
    if (this.isAnswer) {
      this.text.replaceChildren(this.done, this.open);
      if (typeof message.html === "string") this.done.innerHTML = message.html;
      else this.done.replaceChildren(el("p", { class: "plain", dir: "auto" }, written(message.content ?? "")));
      this.open.replaceChildren();
      this.showThoughts(message.reasoning ?? "");
    } else {
      this.text.replaceChildren(el("p", { dir: "auto" }, written(message.content)));
      const attached = [...(message.images ?? []).map((url) => ({ name: "Image", url })), ...(message.files ?? [])];
      if (attached.length) this.text.prepend(attachmentList(attached));
    }
    this.showProblem();
    this.showFoot();
  }

  /** An answer begins again, or is caught up with from its beginning. */
  restart() {
    this.html = "";
    this.done.replaceChildren();
    this.open.replaceChildren(el("p", { class: "waiting" }, el("span", { class: "dots", role: "status", "aria-label": "Waiting for the first word" })));
    this.showThoughts("");
    this.problem.hidden = true;
    this.element.dataset.status = "running";
    this.showFoot();
  }

  /** Puts in what the server's renderer says has changed. */
  apply({ done = [], open = null, append = "", thoughts = "" }) {
    if (thoughts) {
      this.thoughtsText.append(...written(thoughts));
      this.thoughts.hidden = false;
      this.open.querySelector(".waiting")?.remove();
    }
    for (const html of done) this.done.insertAdjacentHTML("beforeend", html);
    this.html += done.join("");
    if (open !== null) this.open.innerHTML = open;
    if (append) lastPart(this.open).append(append);
  }

  showThoughts(text) {
    this.thoughtsText.replaceChildren(...written(text));
    this.thoughts.hidden = !text;
  }

  /** The answer has ended: its blocks are there already. */
  finish(message) {
    this.message = message;
    this.element.dataset.status = message.status;
    this.open.replaceChildren();
    this.showProblem();
    this.showFoot();
  }

  /** While another answer is written nothing else can be asked. */
  wait(waits) {
    this.waits = waits;
    for (const button of this.element.querySelectorAll("[data-waits]")) {
      button.disabled = waits || "end" in button.dataset;
    }
  }

  showProblem() {
    const { status, error } = this.message;
    const sentence = error || (status === "interrupted" ? "The box stopped while it wrote this answer." : "");
    this.problem.hidden = !sentence;
    if (!sentence) return;
    const again = () => this.actions.again(this.message);
    this.problem.replaceChildren(
      el("p", { class: "error", role: "alert" }, sentence),
      el("button", { type: "button", class: "button", onclick: again, "data-waits": "", "data-testid": "retry" }, "Try again"),
    );
  }

  showFoot() {
    const running = this.element.dataset.status === "running";
    this.foot.replaceChildren(
      ...[
        this.branches(),
        running ? null : this.copyButton(),
        running || this.isAnswer ? null : iconButton("pencil", "Edit", () => this.edit(), { "data-waits": "", "data-testid": "edit" }),
        running || !this.isAnswer
          ? null
          : iconButton("refresh", "Answer again", () => this.actions.again(this.message), { "data-waits": "", "data-testid": "regenerate" }),
        running || !this.isAnswer ? null : this.facts(),
        this.message.remembered?.length
          ? el("a", { class: "fact", href: address("/memories"), "data-testid": "remembered" }, icon("memory"), "Remembered")
          : null,
      ].filter(Boolean),
    );
    this.wait(this.waits);
  }

  copyButton() {
    const copied = async (event) => {
      const button = event.currentTarget;
      if (await copy(this.message.content ?? "")) flash(button, icon("check"));
    };
    return iconButton("copy", "Copy", copied, { "data-testid": "copy" });
  }

  branches() {
    const count = this.siblings.length;
    if (count < 2) return null;
    const place = this.siblings.indexOf(this.message.id);
    const go = (step) => () => this.actions.branch(this.siblings[place + step]);
    return el(
      "span",
      { class: "branches", "data-testid": "branches" },
      iconButton("left", "Previous version", go(-1), { "data-waits": "", "data-end": place === 0 }),
      el("span", { class: "numeric", "aria-label": `Version ${place + 1} of ${count}` }, `${place + 1}/${count}`),
      iconButton("right", "Next version", go(1), { "data-waits": "", "data-end": place === count - 1 }),
    );
  }

  facts() {
    const message = this.message;
    const facts = [];
    if (message.model) facts.push(isolated(message.model, { class: "fact" }));
    if (message.tokens_per_second) {
      facts.push(el("span", { class: "fact numeric", "data-testid": "speed" }, `${message.tokens_per_second.toFixed(1)} tokens/s`));
    }
    if (message.completion_tokens) {
      const count = message.completion_tokens;
      facts.push(el("span", { class: "fact numeric" }, `${count} ${count === 1 ? "token" : "tokens"}`));
    }
    if (message.status === "stopped") facts.push(el("span", { class: "fact" }, "stopped"));
    if (message.finish_reason === "length") {
      facts.push(el("span", { class: "fact", title: "The answer reached the limit of tokens." }, "cut off"));
    }
    if (message.request_id) {
      const href = address(`/explorer/r/${encodeURIComponent(message.request_id)}`);
      facts.push(el("a", { class: "fact", href, title: message.request_id, "data-testid": "receipt" }, "Receipt"));
    }
    if (message.memories?.length) facts.push(this.usedMemories(message.memories));
    return el("span", { class: "facts" }, facts);
  }

  /** Which memories the model was told; their texts are asked for when somebody wants to see them. */
  usedMemories(ids) {
    const list = el("ul", {}, el("li", { class: "muted" }, "…"));
    const load = async (event) => {
      if (!event.target.open) return;
      const known = new Map((await this.actions.memories()).data.map((memory) => [memory.id, memory.text]));
      list.replaceChildren(...ids.map((id) => el("li", { dir: "auto" }, known.get(id) ?? "A memory that was deleted")));
    };
    return el(
      "details",
      { class: "fact used", "data-testid": "memories-used", ontoggle: load },
      el("summary", { title: "What the model was told about you" }, icon("memory"), ids.length === 1 ? "1 memory" : `${ids.length} memories`),
      el("div", { class: "used-list" }, list, el("a", { href: address("/memories") }, "Manage memories")),
    );
  }

  /** The question as a text field; what is sent is another branch. */
  edit() {
    const area = el("textarea", { class: "edit-text", "aria-label": "Edit your message", dir: "auto" });
    area.value = this.message.content;
    const leave = () => this.show(this.message);
    const send = () => {
      if (this.waits) return;
      leave();
      if (area.value.trim()) this.actions.edit(this.message, area.value);
    };
    area.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        send();
      } else if (event.key === "Escape") {
        event.stopPropagation();
        leave();
      }
    });
    const buttons = el(
      "div",
      { class: "row end" },
      el("button", { type: "button", class: "button", onclick: leave }, "Cancel"),
      el("button", { type: "button", class: "button primary", onclick: send, "data-waits": "", "data-testid": "send-edit" }, "Send"),
    );
    this.text.replaceChildren(el("div", { class: "edit" }, area, buttons));
    this.foot.replaceChildren();
    area.style.height = `${Math.min(area.scrollHeight + 4, 400)}px`;
    area.focus();
  }
}

/** A text with what nobody sees in it written out, as the server does in answers. */
function written(text) {
  return visible(text).map((part) =>
    typeof part === "string" ? part : el("span", { class: "invisible", title: part.name }, part.code),
  );
}

function attachmentList(items) {
  return el("ul", { class: "attachments" }, items.map((item) => el("li", { class: "attachment" }, preview(item))));
}

function lastPart(element) {
  let part = element;
  for (;;) {
    const last = part.lastElementChild;
    if (!last) return part;
    if (PARTS.has(last.tagName) || /^H[3-6]$/.test(last.tagName) || (last.tagName === "CODE" && part.tagName === "PRE")) {
      part = last;
    } else return part;
  }
}
