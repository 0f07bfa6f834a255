// The endpoints that the chat uses.

import { address, call, eventsOf, send } from "../page.js";

const path = (id, rest = "") => `/v1/conversations/${encodeURIComponent(id)}${rest}`;
const page = (id, rest) => `/chat/${encodeURIComponent(id)}${rest}`;

export const api = {
  conversations(search, after) {
    const parameters = new URLSearchParams({ limit: "60" });
    if (search) parameters.set("search", search);
    if (after) parameters.set("after", after);
    return call("GET", `/v1/conversations?${parameters}`);
  },
  conversation: (id) => call("GET", path(id)),
  /** All messages, the answers with their HTML. */
  messages: (id) => call("GET", page(id, "/messages")),
  create: (fields) => call("POST", "/v1/conversations", fields),
  change: (id, fields) => call("PATCH", path(id), fields),
  remove: (id) => call("DELETE", path(id)),
  exportAddress: (id, format) => address(path(id, `/export?format=${format}`)),
  /** `content`: a Blob with its media type. */
  importFile: (content) => call("POST", "/v1/conversations/import", content),
  declineRecoveryKey: () => call("POST", "/v1/account/recovery-key/decline"),
  /** Begins an answer; resolves with what the stream says first.  The answer goes on without this
   * stream of text: the page follows it as HTML. */
  async answer(id, body) {
    const abort = new AbortController();
    const response = await send("POST", path(id, "/answers"), body, { signal: abort.signal });
    for await (const { data } of eventsOf(response)) {
      abort.abort();
      return data;
    }
    throw new Error("The box began no answer: try again.");
  },
  /** The events of an answer from its beginning, with blocks of HTML. */
  async follow(id, answer, signal) {
    return eventsOf(await send("GET", page(id, `/answers/${answer}`), undefined, { signal }));
  },
  stop: (id, answer) => call("POST", path(id, `/answers/${answer}/stop`)),
  models: () => call("GET", "/v1/models"),
  memories: () => call("GET", "/v1/memories"),
  unlock: (secret) => call("POST", "/v1/account/unlock", { secret }),
};
