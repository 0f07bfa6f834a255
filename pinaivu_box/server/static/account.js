// The forms and buttons of /account.
import { byId, call, checkAgain, confirmed, onSubmit, showDialog, sure, toast } from "./page.js";

const password = document.querySelector("[data-password]");
if (password) {
  onSubmit(password, async (values) => {
    checkAgain(values.new, values.again);
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
  const question = id
    ? ["End this session?", "The browser has to log in again.", "End"]
    : ["End all other sessions?", "All other browsers have to log in again.", "End all others"];
  if (!(await confirmed(...question))) return;
  await call("DELETE", `/v1/account/sessions${id ? `/${encodeURIComponent(id)}` : ""}`);
  location.reload();
});

const recovery = document.querySelector("[data-recovery]");
if (recovery) onSubmit(recovery, async ({ secret }) => {
  const { recovery_key: key } = await call("POST", "/v1/account/recovery-key", { secret });
  recovery.closest("dialog").close();
  byId("recovery-key-text").textContent = key;
  await showDialog(byId("recovery-key"));
  byId("recovery-key-text").textContent = "";
  location.reload();
});

// The chat's offer of a recovery key leads to its dialog.
const named = byId(location.hash.slice(1));
if (named?.matches("dialog")) {
  history.replaceState(null, "", location.pathname); // or it would open again
  showDialog(named);
}

onClick("[data-anew]", async () => {
  const text = "Your chats and memories are deleted for good, and you start with none.";
  if (!(await sure("Delete your locked chats?", text, "Delete them"))) return;
  await call("POST", "/v1/account/start-anew", { delete_everything: true });
  location.reload();
});
