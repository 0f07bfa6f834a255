// What every page does: local times, copy buttons, dialogs, the menu and the theme.

import { address, byId, copyByButton, localTimes, onSubmit, send, showDialog, toast } from "./page.js";

const root = document.documentElement;

localTimes();

document.addEventListener("click", (event) => {
  const target = event.target.closest?.("[data-copy], [data-copy-from], [data-opens], [data-closes], [data-theme-choice]");
  if (!target) return;
  if (target.matches("[data-copy], [data-copy-from]")) copyByButton(target);
  else if (target.dataset.opens) showDialog(byId(target.dataset.opens));
  else if (target.matches("[data-closes]")) target.closest("dialog").close();
  else setTheme(target.dataset.themeChoice);
});

// The menu on narrow screens

const menu = byId("menu");
const nav = byId("nav");

function setMenu(open) {
  nav.toggleAttribute("data-open", open);
  menu.setAttribute("aria-expanded", String(open));
  menu.setAttribute("aria-label", open ? "Close the menu" : "Open the menu");
  const use = menu.querySelector("use");
  use.setAttribute("href", use.getAttribute("href").replace(/#.*/, open ? "#close" : "#menu"));
}

if (menu && nav) {
  menu.addEventListener("click", () => {
    setMenu(menu.getAttribute("aria-expanded") !== "true");
    if (nav.hasAttribute("data-open")) nav.querySelector("a")?.focus();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && nav.hasAttribute("data-open")) {
      setMenu(false);
      menu.focus();
    }
  });
  nav.addEventListener("focusout", (event) => {
    const next = event.relatedTarget;
    if (nav.hasAttribute("data-open") && next && !nav.contains(next) && next !== menu) setMenu(false);
  });
}

// The theme: the system's, unless one was chosen.  A cookie keeps it, so that the server can write
// it into the page and nothing flashes.

function markTheme() {
  const chosen = root.dataset.theme ?? "system";
  for (const button of document.querySelectorAll("[data-theme-choice]")) {
    button.setAttribute("aria-pressed", String(button.dataset.themeChoice === chosen));
  }
}

function setTheme(choice) {
  if (choice === "system") delete root.dataset.theme;
  else root.dataset.theme = choice;
  const age = choice === "system" ? 0 : 31536000;
  document.cookie = `pinaivu_theme=${choice}; path=${address("") || "/"}; max-age=${age}; samesite=lax`;
  markTheme();
}

markTheme();

// Scripted forms that only send something: <form data-method="POST" data-path="/v1/..." data-then="/">

for (const form of document.querySelectorAll("form[data-path]")) {
  onSubmit(form, async (values) => {
    const method = form.dataset.method ?? "POST";
    const body = Object.keys(values).length ? values : undefined;
    await send(method, form.dataset.path, method === "DELETE" ? undefined : body);
    if (form.dataset.done) toast(form.dataset.done);
    if (form.dataset.then) location.assign(address(form.dataset.then));
  });
}
