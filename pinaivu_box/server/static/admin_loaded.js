// The buttons of a model that is loaded, on the pages of models and of engines.

import { counted, on, refresh } from "./admin.js";
import { call, toast } from "./page.js";

on("unload", async ({ model }) => {
  const { running } = await call("POST", "/v1/admin/models/unload", { model });
  const after = running ? ` after ${counted(running, "request")}` : "";
  toast(`${model} is unloaded${after}.`);
  await refresh();
});

on("pin", async ({ model, pinned }) => {
  const answer = await call("POST", "/v1/admin/models/pin", { model, pinned: !pinned });
  const when = answer.configured === answer.pinned ? "" : " until this box stops";
  toast(
    answer.pinned
      ? `${model} stays once it is loaded${when}.`
      : `${model} may be unloaded when it is idle${when}.`,
  );
  await refresh();
});
