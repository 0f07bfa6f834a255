// A transcript as somebody gives it: read as strictly as a receipt, and opened if it is sealed.  The
// same as receipts/given_transcript.py, in the same words.

import { hexOf, ofBase64, utf8 } from "./bytes.js";
import { keyPair, openSealed } from "./sealed_box.js";
import { hkdfSha256 } from "./sha2.js";
import { NotRead, parse, textOf } from "./strict_json.js";
import * as form from "./transcript_form.js";

const INFO = utf8("pinaivu/transcript-key/v1");
const NOT_THE_SECRET =
  "it is not sealed to this key's secret: it needs the one that the key had when the request was " +
  "made";

/** The transcript of a document: what the API returns, or the transcript alone; bytes or text.
 * `secret` is the API key, which a sealed one needs, or null.  Throws NotRead. */
export function readTranscript(document, secret) {
  const shown = inForm(document, (value) => {
    const isAlone = value instanceof Map && value.has("prompts");
    (isAlone ? form.transcript : form.transcriptDocument)(value, "$");
    if (!isAlone && (value.get("transcript") === null) === (value.get("sealed") === null)) {
      throw new NotRead("it has none, or two of them");
    }
  });
  if (shown.has("prompts")) return shown;
  const found = shown.get("transcript") ?? opened(shown, secret);
  if (found.get("request_id") !== shown.get("request_id")) {
    throw new NotRead(`it is that of ${found.get("request_id")}, as one of ${shown.get("request_id")}`);
  }
  return found;
}

/** Whether a document has a transcript that only an API key opens. */
export function isSealed(document) {
  try {
    return parse(asText(document)).get?.("sealed") != null;
  } catch (error) {
    if (!(error instanceof NotRead)) throw error;
    return false;
  }
}

const asText = (document) => (typeof document === "string" ? document : textOf(document));

function inForm(document, check) {
  try {
    const value = parse(asText(document));
    check(value);
    return value;
  } catch (error) {
    if (!(error instanceof NotRead)) throw error;
    throw new NotRead(`this is not a transcript: ${error.message}`);
  }
}

function opened(shown, secret) {
  if (secret === null) {
    throw new NotRead("it is sealed: the API key that made the request opens it");
  }
  const sealed = ofBase64(shown.get("sealed"));
  if (sealed === null) {
    const why = "it contains a text that is not Base64 in its one spelling";
    throw new NotRead(`this is not a transcript: ${why}`);
  }
  const keys = keyPair(hkdfSha256(utf8(secret), INFO));
  const to = shown.get("sealed_to");
  const isTo = to === null || to === hexOf(keys.publicKey);
  const content = isTo ? openSealed(sealed, keys) : null;
  if (content === null) throw new NotRead(NOT_THE_SECRET);
  return inForm(content, (value) => form.transcript(value, "$"));
}
