// The forms and buttons of /account.
import { call, confirmed, onSubmit, showDialog, toast } from "./page.js";

const password = document.querySelector("[data-password]");
if (password) {
  onSubmit(password, async (values) => {
    if (values.again !== values.new) {
      throw Object.assign(new Error("The two passwords differ."), { param: "again" });
    }
    await call("POST", "/v1/account/password", { current: values.current, new: values.new });
    location.reload(); // for the new CSRF token
  });
}

for (const form of document.querySelectorAll("[data-seal]")) {
  onSubmit(form, async ({ password, passphrase, secret }) => {
    const body = { sealed: form.dataset.seal };
    if (secret) body.secret = secret;
    if (password) body.password = password;
    if (passphrase) body.passphrase = passphrase;
    await call("POST", "/v1/account/sealed", body);
    location.reload();
  });
}

/** Do something when a button is pressed; its error is shown in the corner. */
function onClick(selector, work) {
  for (const button of document.querySelectorAll(selector)) {
    button.addEventListener("click", async () => {
      try {
        await work(button);
      } catch (error) {
        toast(error.message, "bad");
      }
    });
  }
}

onClick("[data-end]", async (button) => {
  const id = button.dataset.end;
  const sure = await confirmed(id
    ? { title: "End this session?", text: "The browser has to log in again.", action: "End" }
    : { title: "End all other sessions?", text: "All other browsers have to log in again.", action: "End all others" });
  if (!sure) return;
  await call("DELETE", `/v1/account/sessions${id ? `/${encodeURIComponent(id)}` : ""}`);
  location.reload();
});

const recovery = document.querySelector("[data-recovery]");
if (recovery) onSubmit(recovery, async ({ secret }) => {
  const { recovery_key: key } = await call("POST", "/v1/account/recovery-key", { secret });
  recovery.closest("dialog").close();
  document.getElementById("recovery-key-text").textContent = key;
  await showDialog(document.getElementById("recovery-key"));
  document.getElementById("recovery-key-text").textContent = "";
  location.reload();
});

// The chat's offer of a recovery key leads to its dialog.
const named = document.getElementById(location.hash.slice(1));
if (named?.matches("dialog")) {
  history.replaceState(null, "", location.pathname); // or it would open again
  showDialog(named);
}

onClick("[data-anew]", async () => {
  const sure = await confirmed({
    title: "Delete your locked chats?",
    text: "Your chats and memories are deleted for good, and you start with none.",
    action: "Delete them",
    danger: true,
  });
  if (!sure) return;
  await call("POST", "/v1/account/start-anew", { delete_everything: true });
  location.reload();
});
