// The explorer's pages: the visitor's browser verifies a receipt, from this box or from a file.

import { element, icon, send } from "./page.js";
import { verifyReceipt } from "./verify.js";

const MAX_FILE_BYTES = 20_000_000; // the largest receipt is far below

/** Verify these bytes and show each check in `place` once it is made. */
async function verifyInto(place, bytes) {
  const [verdict, list] = [place.querySelector(".verdict"), place.querySelector(".checks")];
  list.replaceChildren();
  verdict.className = "verdict";
  verdict.textContent = "This browser verifies the receipt …";
  const checks = await verifyReceipt(bytes, { onCheck: (check) => list.append(shown(check)) });
  const failed = checks.filter((check) => !check.ok).length;
  verdict.classList.add(failed ? "bad" : "ok");
  verdict.textContent = failed
    ? `This receipt does not verify: ${failed} of ${checks.length} checks ${failed === 1 ? "fails" : "fail"}.`
    : `All ${checks.length} checks hold. This browser made them, not the box.`;
}

function shown({ id, ok, text }) {
  return element(
    "li",
    { class: ok ? "ok" : "bad", "data-check": id },
    element("span", { class: "mark" }, icon(ok ? "check" : "close")),
    element(
      "div",
      {},
      element("strong", {}, id),
      element("span", { class: "out-of-sight" }, ok ? "holds: " : "does not hold: "),
      element("p", {}, text),
    ),
  );
}

function failedToRead(place, error) {
  const verdict = place.querySelector(".verdict");
  verdict.className = "verdict bad";
  verdict.textContent = error.message;
  place.querySelector(".checks").replaceChildren();
}

const verification = document.getElementById("verification");
if (verification?.dataset.src) {
  const place = document.getElementById("result");
  const again = document.getElementById("verify-again");
  const run = async () => {
    again.setAttribute("aria-busy", "true");
    try {
      const response = await send("GET", verification.dataset.src);
      await verifyInto(place, new Uint8Array(await response.arrayBuffer()));
    } catch (error) {
      failedToRead(place, error);
    }
    again.removeAttribute("aria-busy");
  };
  again.hidden = false;
  again.addEventListener("click", run);
  run();
}

const file = document.getElementById("file");
file?.addEventListener("change", async () => {
  const place = document.getElementById("file-result");
  const [chosen] = file.files;
  if (!chosen) return;
  place.hidden = false;
  try {
    if (chosen.size > MAX_FILE_BYTES) throw new Error("This file is too large for a receipt.");
    await verifyInto(place, new Uint8Array(await chosen.arrayBuffer()));
  } catch (error) {
    failedToRead(place, error);
  }
});
