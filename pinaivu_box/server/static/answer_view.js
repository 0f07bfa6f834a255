// An answer while it comes: its text, or its tokens with their probabilities, and its figures.

import { byId, element, number } from "./page.js";

const FIGURES = ["ttft", "speed", "total", "prompt-tokens", "answer-tokens", "finish"];
const LEVELS = [0.1, 0.3, 0.6, 0.9]; // bounds of what is shown in one colour

const time = (value) =>
  value < 9_999 ? `${Math.round(value)} ms` : `${(value / 1000).toFixed(1)} s`;
const percent = (share) => `${(share * 100).toFixed(share < 0.01 ? 2 : 1)} %`;
const visible = (text) =>
  text.replaceAll(" ", "␣").replaceAll("\n", "⏎").replaceAll("\t", "⇥") || "(nothing)";

export class AnswerView {
  constructor() {
    this.sent = performance.now();
    this.first = this.last = null; // when a piece came
    this.pieces = 0;
    this.usage = null;
    this.finish = "";
    this.thoughts = null;
    this.place = byId("answer");
    this.place.replaceChildren();
    this.place.setAttribute("aria-busy", "true");
    byId("token").hidden = true;
    byId("figures").hidden = false;
    byId("spoken").textContent = "";
    for (const id of FIGURES) byId(id).textContent = "–";
  }

  /** Whether anything has come. */
  get begun() {
    return this.first !== null;
  }

  add(chunk) {
    this.usage = chunk.usage ?? this.usage;
    const choice = chunk.choices?.[0];
    if (!choice) return;
    this.finish = choice.finish_reason ?? this.finish;
    const { content, reasoning_content: thought } = choice.delta ?? {};
    const tokens = choice.logprobs?.content ?? [];
    if (thought || content || tokens.length) this.note(tokens.length || 1);
    if (thought) this.think(thought);
    if (tokens.length) this.place.append(...tokens.map(tokenElement));
    else if (content) this.place.append(content);
  }

  note(pieces) {
    this.last = performance.now();
    if (this.first === null) {
      this.first = this.last;
      byId("ttft").textContent = time(this.first - this.sent);
    }
    this.pieces += pieces;
    this.showSpeed(this.pieces);
  }

  think(text) {
    if (this.thoughts === null) {
      this.thoughts = element("div", { class: "thoughts" });
      this.place.prepend(this.thoughts);
    }
    this.thoughts.append(text);
  }

  showSpeed(tokens) {
    const seconds = (this.last - this.first) / 1000;
    if (tokens < 2 || seconds <= 0) return;
    byId("speed").textContent = ((tokens - 1) / seconds).toFixed(1);
  }

  /** `why` it ended, if not by itself. */
  end(why = "") {
    this.place.setAttribute("aria-busy", "false");
    if (!this.place.hasChildNodes()) {
      const text = why ? "Nothing came." : "The answer is empty.";
      this.place.append(element("p", { class: "muted" }, text));
    }
    const first = this.place.querySelector(".token");
    if (first) first.tabIndex = 0;
    byId("total").textContent = time(performance.now() - this.sent);
    byId("finish").textContent = why || this.finish || "–";
    if (this.usage) this.showUsage(this.usage);
    byId("spoken").textContent = this.place.textContent;
  }

  showUsage({ prompt_tokens, completion_tokens, prompt_tokens_details }) {
    const cached = prompt_tokens_details?.cached_tokens;
    byId("prompt-tokens").textContent =
      number(prompt_tokens) + (cached ? ` (${number(cached)} cached)` : "");
    byId("answer-tokens").textContent = number(completion_tokens);
    if (this.begun) this.showSpeed(completion_tokens);
  }
}

// Tokens: one of them can be reached with the Tab key, the others from there with arrow keys

const shownTokens = new WeakMap();

function tokenElement(token) {
  const level = LEVELS.filter((bound) => Math.exp(token.logprob) > bound).length;
  const made = element("span", { class: `token p${level}`, tabindex: "-1" }, token.token);
  shownTokens.set(made, token);
  return made;
}

function showToken(target) {
  const token = shownTokens.get(target);
  const others = token.top_logprobs.filter((other) => other.token !== token.token);
  const rows = [token, ...others].sort((one, other) => other.logprob - one.logprob);
  byId("token").replaceChildren(
    element("table", { class: "data" },
      element("caption", {},
        element("bdi", {}, element("code", {}, visible(token.token))),
        ` had a probability of ${percent(Math.exp(token.logprob))}`),
      element("thead", {}, element("tr", {},
        element("th", { scope: "col" }, "Token"),
        element("th", { scope: "col", class: "numeric" }, "Probability"),
        element("th", { scope: "col", class: "numeric" }, "Logarithm"))),
      element("tbody", {}, rows.map((row) =>
        element("tr", { class: row === token ? "chosen" : null },
          element("td", {}, element("bdi", {}, element("code", {}, visible(row.token)))),
          element("td", { class: "numeric" }, percent(Math.exp(row.logprob))),
          element("td", { class: "numeric" }, row.logprob.toFixed(3)))))),
  );
  byId("token").hidden = false;
}

const tokenAt = (event) => (shownTokens.has(event.target) ? event.target : null);
const answer = byId("answer");

answer?.addEventListener("pointerover", (event) => {
  const token = tokenAt(event);
  if (token) showToken(token);
});

answer?.addEventListener("focusin", (event) => {
  const token = tokenAt(event);
  if (!token) return;
  for (const other of answer.querySelectorAll(".token[tabindex='0']")) other.tabIndex = -1;
  token.tabIndex = 0;
  showToken(token);
});

answer?.addEventListener("keydown", (event) => {
  const token = tokenAt(event);
  const next = { ArrowRight: "nextElementSibling", ArrowLeft: "previousElementSibling" }[event.key];
  if (!token || !next || !shownTokens.has(token[next])) return;
  event.preventDefault();
  token[next].focus();
});
