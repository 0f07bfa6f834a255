// The model and the system prompt of a conversation, and the parameters of answers.

import { byId, element as el, showDialog } from "../page.js";

// Kept in the browser: nothing that was said is in them.
const LAST_MODEL = "pinaivu-chat-model";
const PARAMETERS = "pinaivu-chat-parameters";

export class Settings {
  /** `on`: failed(error), model(model) when another one is chosen. */
  constructor(api, on) {
    this.api = api;
    this.on = on;
    this.select = byId("model");
    this.dialog = byId("settings");
    this.form = this.dialog.querySelector("form");
    this.models = [];
    this.conversation = null;
    this.draft = { system: "", memory: true };
    this.select.addEventListener("change", () => this.choose());
  }

  async load() {
    try {
      this.models = (await this.api.models()).data;
    } catch (error) {
      this.on.failed(error);
    }
    this.show(this.conversation);
  }

  /** The settings of a conversation, or of one that is not begun. */
  show(conversation) {
    this.conversation = conversation;
    const wanted = conversation?.model || this.lastModel();
    const options = this.models.map((model) => el("option", { value: model.id }, model.id));
    if (wanted && !this.models.some((model) => model.id === wanted)) {
      options.unshift(el("option", { value: wanted }, `${wanted} (not on this box)`));
    }
    if (!options.length) options.push(el("option", { value: "" }, "No model"));
    this.select.replaceChildren(...options);
    if (wanted) this.select.value = wanted;
    this.announce();
  }

  lastModel() {
    const last = localStorage.getItem(LAST_MODEL);
    return this.models.some((model) => model.id === last) ? last : (this.models[0]?.id ?? "");
  }

  announce() {
    this.on.model(this.models.find((model) => model.id === this.select.value));
  }

  async choose() {
    localStorage.setItem(LAST_MODEL, this.select.value);
    this.announce();
    await this.save({ model: this.select.value });
  }

  /** What a new conversation begins with. */
  fields() {
    return { ...this.draft, model: this.select.value };
  }

  /** What each answer is asked for with. */
  parameters() {
    const parameters = JSON.parse(localStorage.getItem(PARAMETERS) ?? "{}");
    if (this.select.value) parameters.model = this.select.value;
    return parameters;
  }

  async ask() {
    const { system, memory } = this.conversation ?? this.draft;
    const parameters = this.parameters();
    const fields = this.form.elements;
    fields.system.value = system;
    fields.memory.checked = memory;
    fields.temperature.value = parameters.temperature ?? "";
    fields.max_tokens.value = parameters.max_tokens ?? "";
    if ((await showDialog(this.dialog)) !== "save") return;
    const chosen = {};
    for (const field of [fields.temperature, fields.max_tokens]) {
      if (field.value !== "") chosen[field.name] = field.valueAsNumber;
    }
    localStorage.setItem(PARAMETERS, JSON.stringify(chosen));
    await this.save({ system: fields.system.value.trim(), memory: fields.memory.checked });
  }

  async save(changes) {
    if (this.conversation === null) {
      Object.assign(this.draft, changes);
      return;
    }
    try {
      Object.assign(this.conversation, changes);
      await this.api.change(this.conversation.id, changes);
    } catch (error) {
      this.on.failed(error);
    }
  }
}
