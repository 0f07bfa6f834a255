// The explorer's pages: the visitor's browser verifies a receipt, from this box or from a file, and
// the transcript of its request.

import { GivenDocument } from "./given_document.js";
import { isSealed } from "./given_transcript.js";
import { clearErrors, element, icon, send, showError } from "./page.js";
import { verifyReceipt } from "./verify.js";

/** Verify this receipt, with a transcript if there is one, and show each check in `place` once it is
 * made. */
async function verifyInto(place, receipt, transcript = null) {
  const [verdict, list] = [place.querySelector(".verdict"), place.querySelector(".checks")];
  list.replaceChildren();
  verdict.className = "verdict";
  verdict.textContent = "This browser verifies the receipt …";
  const checks = await verifyReceipt(receipt, {
    transcript,
    onCheck: (check) => list.append(shown(check)),
  });
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

/** The form for what the visitor has: a transcript, and the receipt, unless the form says where this
 * box has them. */
function given(form) {
  const place = document.getElementById("file-result");
  const button = form.querySelector("[type=submit]");
  const key = document.getElementById("transcript-key");
  const ownReceipt = document.getElementById("given-receipt");
  const submit = () => form.requestSubmit();
  const receipt = ownReceipt && new GivenDocument(ownReceipt, submit);
  const transcript = new GivenDocument(document.getElementById("given-transcript"), submit);
  let last = Promise.resolve(); // one after another, so that the last one is shown

  async function documents() {
    const { dataset } = form;
    const found = (await transcript.read()) ?? (await fetched(dataset.transcript));
    if (!receipt && !found) throw new Error("Give the transcript, as a file or its text.");
    const bytes = receipt ? await receipt.read() : await fetched(dataset.receipt);
    if (bytes) return [bytes, found];
    throw new Error(
      found ? "Give the receipt too, with its opening." : "Give the receipt, as a file or its text.",
    );
  }

  async function verify() {
    clearErrors(form);
    place.hidden = true;
    button.setAttribute("aria-busy", "true");
    try {
      const [bytes, found] = await documents();
      const sealed = found !== null && isSealed(found);
      document.getElementById("transcript-key-field").hidden = !sealed;
      if (sealed && !key.value.trim()) {
        key.focus();
        throw new Error("The transcript is sealed: give the API key that made the request.");
      }
      place.hidden = false;
      const secret = sealed ? key.value.trim() : null;
      await verifyInto(place, bytes, found && { document: found, secret });
    } catch (error) {
      showError(form, error);
    }
    button.removeAttribute("aria-busy");
  }

  button.hidden = false;
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    last = last.then(verify);
  });
}

async function fetched(path) {
  if (!path) return null;
  const response = await send("GET", path);
  return new Uint8Array(await response.arrayBuffer());
}

const form = document.getElementById("given");
if (form) given(form);
