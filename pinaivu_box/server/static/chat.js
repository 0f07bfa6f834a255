// The page /chat: joins the list, the open conversation, the composer and the settings.

import { api } from "./chat/api.js";
import { Attachments } from "./chat/attachments.js";
import { Conversation } from "./chat/conversation.js";
import { flash } from "./chat/parts.js";
import { ConversationList } from "./chat/list.js";
import { Settings } from "./chat/settings.js";
import { address, byId, copy, onSubmit, toast } from "./page.js";

const page = byId("chat");
const text = byId("message-text");
const send = byId("send");
const stop = byId("stop");
const notice = byId("notice");
const narrow = matchMedia("(max-width: 56rem)");

const attachments = new Attachments(byId("attachments"), (sentence) => say(sentence));
const settings = new Settings(api, {
  failed: show,
  model: (model) => {
    attachments.takesImages = model?.architecture.input_modalities.includes("image") ?? false;
  },
});
const conversation = new Conversation(
  api,
  { log: byId("log"), scroller: byId("scroller"), toEnd: byId("to-end") },
  {
    failed: show,
    parameters: () => settings.parameters(),
    running: (running) => {
      page.dataset.running = running ? "yes" : "no";
      send.hidden = running;
      stop.hidden = !running;
      byId("log").setAttribute("aria-busy", running ? "true" : "false");
    },
    changed: (data) => {
      list.touch(data);
      showTitle(data.title);
    },
    retitled: (data) => {
      list.replace(data);
      showTitle(data.title);
    },
  },
);
const list = new ConversationList(api, {
  open: (id) => go(id),
  renamed: (changed) => {
    if (conversation.data?.id !== changed.id) return;
    conversation.data.title = changed.title;
    showTitle(changed.title);
  },
  deleted: (id) => {
    if (conversation.data?.id === id) go(null);
  },
  failed: show,
});

/** Says what went wrong, with a button that tries again where there is something to try. */
function say(sentence, again = null) {
  notice.querySelector("[data-sentence]").textContent = sentence;
  const button = notice.querySelector("[data-again]");
  button.hidden = again === null;
  button.onclick = () => {
    notice.hidden = true;
    again();
  };
  notice.hidden = !sentence;
}

function show(error, again = null) {
  if (isLocked(error)) lock();
  else say(error.message, again);
}

function isLocked(error) {
  return error.code === "locked";
}

/** The key of the account's chats is only in memory: after a restart the box asks for the password. */
function lock() {
  page.dataset.state = "locked";
  const form = byId("unlock");
  form.elements.secret?.focus();
}

onSubmit(byId("unlock"), async ({ secret }, form) => {
  await api.unlock(secret);
  form.reset();
  page.dataset.state = "open";
  await start();
});

function showTitle(title) {
  byId("title").textContent = title || "New chat";
  document.title = `${title || "Chat"} · ${page.dataset.box}`;
}

function showEmpty() {
  page.dataset.empty = conversation.tree.byId.size ? "no" : "yes";
}

/** Opens a conversation, or the page for a new one. */
async function go(id, { push = true } = {}) {
  if (push) history.pushState(null, "", address(id ? `/chat/${encodeURIComponent(id)}` : "/chat"));
  drawer(false);
  say("");
  list.select(id);
  if (id === null) {
    conversation.clear();
    settings.show(null);
    showTitle("");
    showEmpty();
    if (!narrow.matches) text.focus();
    return;
  }
  page.dataset.empty = "no";
  try {
    if (!(await conversation.open(id))) return;
    settings.show(conversation.data);
    showTitle(conversation.data.title);
    showEmpty();
  } catch (error) {
    show(error, () => go(id, { push: false }));
  }
}

let creating = false;

async function submit() {
  const content = text.value.trim();
  const items = attachments.items;
  const sent = attachments.fields();
  if ((!content && !items.length) || creating || page.dataset.running === "yes") return;
  const { signal } = conversation.abort; // aborted once another conversation is open
  say("");
  text.value = "";
  attachments.clear();
  fit();
  try {
    if (conversation.data === null) {
      const fields = settings.fields();
      const parameters = settings.parameters();
      creating = true;
      const created = await api.create(fields).finally(() => (creating = false));
      if (signal.aborted) { // the message is sent all the same
        await api.answer(created.id, { ...parameters, content, parent: null, ...sent });
        await list.load();
        return;
      }
      conversation.data = created;
      settings.show(conversation.data);
      list.touch(created);
      list.select(created.id);
      history.replaceState(null, "", address(`/chat/${encodeURIComponent(created.id)}`));
    }
    closeOffer();
    page.dataset.empty = "no";
    await conversation.ask({ content, parent: conversation.tree.leaf ?? null, ...sent });
  } catch (error) {
    if (!text.value) text.value = content; // nothing that was written is lost
    if (!attachments.items.length && items.length) {
      attachments.items = items;
      attachments.show();
    }
    fit();
    if (signal.aborted) show(error); // it would be sent to the other conversation
    else {
      showEmpty();
      show(error, submit);
    }
  }
}

/** The field is as high as its text, up to a limit of the style sheet. */
function fit() {
  text.style.height = "auto";
  text.style.height = `${text.scrollHeight + 2}px`;
}

function drawer(open) {
  page.dataset.drawer = open ? "open" : "closed";
  byId("open-list").setAttribute("aria-expanded", open ? "true" : "false");
  if (narrow.matches) byId("chat-list").inert = !open;
  else byId("chat-list").inert = false;
  if (open) byId("search").focus();
}

/** On a phone the keyboard covers the page: the composer stays above it. */
function fitToScreen() {
  const view = window.visualViewport;
  if (!view) return;
  const top = page.getBoundingClientRect().top + view.offsetTop;
  const covered = window.innerHeight - view.height > 120;
  page.style.height = covered ? `${Math.max(240, view.height - Math.max(0, top))}px` : "";
  if (covered && conversation.running) conversation.scrollToEnd();
}

async function importFile(file) {
  const markdown = /\.(md|markdown)$/i.test(file.name);
  const content = file.slice(0, file.size, markdown ? "text/markdown" : "application/json");
  try {
    const { conversations: count } = await api.importFile(content);
    const lost = markdown ? " Markdown holds one branch, and neither images nor thoughts and receipts." : "";
    toast(`${count} ${count === 1 ? "conversation was" : "conversations were"} imported.${lost}`);
    await list.load();
  } catch (error) {
    say(`${file.name} was not imported. ${error.message}`);
  }
}

const offer = byId("recovery-offer"); // missing if it was answered before

/** It is made once: whoever goes on without an answer has seen it. */
function closeOffer() {
  if (!offer || offer.offsetParent === null) return; // it is not seen here
  offer.hidden = true;
  api.declineRecoveryKey().catch(() => {}); // then it is made once more
}

async function start() {
  await Promise.all([list.load(), settings.load()]);
  const id = decodeURIComponent(location.pathname.slice(address("").length).split("/")[2] ?? "");
  await go(id || null, { push: false });
}

text.addEventListener("input", fit);
text.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  submit();
});
byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  submit();
});
stop.addEventListener("click", () => conversation.stop());
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || document.querySelector("dialog[open]")) return;
  if (page.dataset.drawer === "open") {
    drawer(false);
    byId("open-list").focus();
  } else conversation.stop();
});
byId("new-chat").addEventListener("click", (event) => {
  event.preventDefault();
  go(null);
});
byId("open-list").addEventListener("click", () => drawer(page.dataset.drawer !== "open"));
byId("shade").addEventListener("click", () => drawer(false));
byId("open-settings").addEventListener("click", () => settings.ask());
byId("attach").addEventListener("click", () => byId("files").click());
byId("files").addEventListener("change", (event) => {
  attachments.add([...event.target.files]);
  event.target.value = "";
});
byId("import").addEventListener("click", () => byId("import-file").click());
byId("import-file").addEventListener("change", (event) => {
  if (event.target.files[0]) importFile(event.target.files[0]);
  event.target.value = "";
});
text.addEventListener("paste", (event) => {
  const files = [...event.clipboardData.files];
  if (!files.length) return;
  event.preventDefault();
  attachments.add(files);
});
page.addEventListener("dragover", (event) => event.preventDefault());
page.addEventListener("drop", (event) => {
  event.preventDefault();
  attachments.add([...event.dataTransfer.files]);
});
byId("log").addEventListener("click", async (event) => {
  const button = event.target.closest("[data-copy-code]");
  if (!button) return;
  if (await copy(button.closest(".code").querySelector("code").textContent)) flash(button, "Copied");
});
for (const example of document.querySelectorAll("[data-example]")) {
  example.addEventListener("click", () => {
    text.value = example.textContent;
    fit();
    text.focus();
  });
}
offer?.querySelector("[data-decline]").addEventListener("click", () => {
  closeOffer();
  text.focus();
});
addEventListener("popstate", () => start());
narrow.addEventListener("change", () => drawer(false));
window.visualViewport?.addEventListener("resize", fitToScreen);

drawer(false);
if (page.dataset.state === "locked") lock();
else start();
