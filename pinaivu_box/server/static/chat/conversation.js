// The open conversation: its messages, and the answer that is being written.

import { Tree } from "./tree.js";
import { MessageView } from "./view.js";

const NEAR_END = 60; // pixels: a reader who is closer to the end follows the answer
const RETRY_SECONDS = [0.5, 1, 2, 4, 8, 15]; // after which a broken stream is followed again
const TITLE_SECONDS = [3, 5, 10, 20, 40]; // after which it is looked whether a model has found a title

export class Conversation {
  /** `on`: failed(error, again), running(bool), changed(conversation), retitled(conversation),
   * parameters() for an answer. */
  constructor(api, elements, on) {
    this.api = api;
    this.log = elements.log;
    this.scroller = elements.scroller;
    this.toEnd = elements.toEnd;
    this.on = on;
    this.scroller.addEventListener("scroll", () => this.showToEnd(), { passive: true });
    this.toEnd.addEventListener("click", () => this.scrollToEnd());
    this.clear();
  }

  clear() {
    this.abort?.abort(); // the answer itself goes on
    this.abort = new AbortController();
    this.data = null;
    this.tree = new Tree([], null);
    this.views = new Map();
    this.wish = null;
    this.setRunning(null);
    this.log.replaceChildren();
    this.showToEnd();
  }

  /** Returns whether it is still the one that is wanted: another may have been chosen meanwhile. */
  async open(id) {
    this.clear();
    const { abort } = this;
    let found;
    try {
      found = await Promise.all([this.api.conversation(id), this.api.messages(id)]);
    } catch (error) {
      if (abort.signal.aborted) return false;
      throw error;
    }
    if (abort.signal.aborted) return false;
    const [conversation, messages] = found;
    this.data = conversation;
    this.tree = new Tree(messages.data, messages.leaf);
    this.show();
    this.scrollToEnd();
    this.followRunning();
    return true;
  }

  /** `id`: of the answer that runs, "" before it has one, null if none runs. */
  setRunning(id) {
    this.running = id;
    for (const view of this.views.values()) view.wait(id !== null);
    this.on.running(id !== null);
  }

  show() {
    this.views.clear();
    const views = this.tree.path().map((message) => this.view(message));
    this.log.replaceChildren(...views.map((view) => view.element));
  }

  view(message) {
    const view = new MessageView(message, this.tree.siblings(message), {
      edit: (question, content) => this.report(this.edit(question, content)),
      again: (answer) => this.report(this.again(answer)),
      branch: (sibling) => this.report(this.branch(sibling)),
      memories: () => this.api.memories(),
    });
    view.wait(this.running !== null);
    this.views.set(message.id, view);
    return view;
  }

  async report(work) {
    try {
      await work;
    } catch (error) {
      this.on.failed(error);
    }
  }

  async branch(id) {
    if (this.running !== null) return;
    const { abort } = this;
    await this.api.change(this.data.id, { leaf: this.tree.newestLeaf(id) });
    await this.reload(abort); // only the branch that is shown has HTML
    if (abort.signal.aborted) return;
    this.views.get(id)?.element.querySelector(".branches button:not([disabled])")?.focus();
    this.followRunning();
  }

  edit(question, content) {
    const { parent, files, images } = question;
    return this.ask({ content, parent, files, images });
  }

  again(message) {
    return this.ask({ parent: message.role === "assistant" ? message.parent : message.id });
  }

  /** Sends a message, or asks for another answer where there is no `content`, and returns once the answer has
   * ended.  Raises what the box refuses, never after the answer has begun. */
  async ask(body) {
    if (this.running !== null) return;
    const { abort } = this;
    const { id } = this.data;
    const wish = (this.wish = { stop: false });
    this.setRunning("");
    let started;
    try {
      started = await this.api.answer(id, { ...this.on.parameters(), ...body });
    } catch (error) {
      if (!abort.signal.aborted) this.setRunning(null);
      throw error;
    }
    if (wish.stop) this.report(this.api.stop(id, started.answer.id));
    if (abort.signal.aborted) return; // another conversation is open
    for (const message of [started.message, started.answer]) if (message) this.tree.add(message);
    this.tree.leaf = started.answer.id;
    this.show();
    this.scrollToEnd();
    const untitled = !this.data.title;
    if (untitled) this.report(this.retitle(abort));
    await this.follow(started.answer.id);
    if (untitled) this.report(this.awaitTitle(abort));
  }

  /** The first message has given the conversation its title. */
  async retitle(abort) {
    const { title } = await this.api.conversation(this.data.id);
    if (abort.signal.aborted) return;
    this.data = { ...this.data, title };
    this.on.changed(this.data);
  }

  /** In idle time the box may find a better one. */
  async awaitTitle(abort) {
    const before = this.data?.title;
    for (const seconds of TITLE_SECONDS) {
      await new Promise((resolve) => setTimeout(resolve, seconds * 1000));
      if (abort.signal.aborted || this.data.title !== before) return;
      const { title } = await this.api.conversation(this.data.id);
      if (abort.signal.aborted || this.data.title !== before) return;
      if (title === before) continue;
      this.data = { ...this.data, title };
      this.on.retitled(this.data);
      return;
    }
  }

  followRunning() {
    const running = this.tree.path().find((message) => message.status === "running");
    if (running) this.report(this.follow(running.id));
  }

  /** Shows an answer from its beginning until it has ended, through breaks of the connection.  Where that fails it
   * says so, with a way to try again. */
  async follow(id) {
    const { abort } = this;
    const again = () => {
      if (!abort.signal.aborted && this.running === null) this.report(this.follow(id));
    };
    let failure = null;
    this.setRunning(id);
    for (const seconds of [0, ...RETRY_SECONDS]) {
      if (seconds) await new Promise((resolve) => setTimeout(resolve, seconds * 1000));
      if (abort.signal.aborted) return;
      try {
        const events = await this.api.follow(this.data.id, id, abort.signal);
        this.views.get(id)?.restart();
        if (await this.take(events, abort)) return;
      } catch (error) {
        if (abort.signal.aborted) return;
        failure = error;
        if (error.status < 500) break; // asking again would not change it
      }
    }
    try {
      await this.reload(abort);
      if (abort.signal.aborted) return;
      if (this.tree.byId.get(id)?.status === "running") failure ??= new Error("The connection broke: try again.");
      else failure = null;
    } catch (error) {
      failure = error;
    } finally {
      if (!abort.signal.aborted) this.setRunning(null);
    }
    if (failure && !abort.signal.aborted) this.on.failed(failure, again);
  }

  async reload(abort) {
    if (abort.signal.aborted) return;
    const messages = await this.api.messages(this.data.id);
    if (abort.signal.aborted) return;
    this.tree = new Tree(messages.data, messages.leaf);
    this.show();
  }

  /** Returns whether the answer has ended. */
  async take(events, abort) {
    for await (const { name, data } of events) {
      if (abort.signal.aborted) return true;
      const atEnd = this.isAtEnd();
      if (name === "blocks") this.views.get(this.running)?.apply(data);
      else if (name === "finished") this.end(data);
      if (atEnd) this.scrollToEnd();
      if (name === "finished") return true;
    }
    return abort.signal.aborted;
  }

  end({ answer, title }) {
    const view = this.views.get(answer.id);
    this.tree.add({ ...answer, html: view?.html }); // for when the branch is drawn again
    view?.finish(this.tree.byId.get(answer.id));
    this.setRunning(null);
    this.data = { ...this.data, title, leaf: answer.id, updated_at: Date.now() };
    this.on.changed(this.data);
  }

  /** An answer that has not begun is stopped when it does. */
  async stop() {
    if (this.running === "") this.wish.stop = true;
    else if (this.running) await this.report(this.api.stop(this.data.id, this.running));
  }

  isAtEnd() {
    const { scrollHeight, scrollTop, clientHeight } = this.scroller;
    return scrollHeight - scrollTop - clientHeight < NEAR_END;
  }

  scrollToEnd() {
    this.scroller.scrollTop = this.scroller.scrollHeight;
    this.showToEnd();
  }

  showToEnd() {
    this.toEnd.hidden = this.isAtEnd();
  }
}
