// The forms of /login, /login/link/... and /signup.
import { call, checkAgain, onSubmit } from "./page.js";

/** Begin a session, then go where the box says. */
function enter(form, path, bodyOf) {
  if (!form) return;
  onSubmit(form, async (values) => {
    if ("again" in values) checkAgain(values.password, values.again);
    location.assign((await call("POST", path, bodyOf(values))).next);
  });
}

const login = document.querySelector("[data-login]");
enter(login, "/v1/session", ({ name, password }) => ({ name, password, next: login.dataset.next }));

const link = document.querySelector("[data-link]");
enter(link, "/v1/session/link", ({ password }) => ({ token: link.dataset.link, password }));

const signup = document.querySelector("[data-signup]");
enter(signup, "/v1/signup", ({ name, password }) => (
  { name, password, invitation: signup.dataset.signup }
));
