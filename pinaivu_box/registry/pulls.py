"""Pulls by name: where a name leads is looked up, and a download that runs is shared by all who ask
for it.

What speaks HTTP is imported by the first pull: most boxes start more often than they pull.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pinaivu_box.errors import PullFailed
from pinaivu_box.files.download import Download
from pinaivu_box.models import splits
from pinaivu_box.models.gguf_bytes import BadGguf
from pinaivu_box.registry.reference import HubModel, LocalModel, RegistryModel, UrlModel
from pinaivu_box.tasks import ignore_exception

if TYPE_CHECKING:
    from pinaivu_box.registry.client import RegistryClient
    from pinaivu_box.registry.manifest import Listing
    from pinaivu_box.registry.transfer import Transfer


def client_for(reference: RegistryModel | HubModel | UrlModel) -> RegistryClient:
    """Return a client for the registry of a name; the Hub's has the user's token."""
    from pinaivu_box.registry.client import RegistryClient, hub_token

    match reference:
        case HubModel(base=base):
            return RegistryClient(base, hub_token())
        case RegistryModel(base=base):
            return RegistryClient(base)
        case UrlModel(url=url):
            return RegistryClient(url)


async def look_up(
    client: RegistryClient, reference: RegistryModel | HubModel | UrlModel
) -> Listing:
    """Return what the registry has under a name.  Raises PullFailed."""
    from pinaivu_box.registry import manifest

    match reference:
        case HubModel():
            return await manifest.of_hub(client, reference)
        case RegistryModel():
            return await manifest.of_registry(client, reference)
        case UrlModel():
            return manifest.of_url(reference)


def link(model: LocalModel, folder: Path) -> list[Path]:
    """Link the files of a model of this machine into a models folder, under its id.  Returns the
    links.  Raises PullFailed, OSError."""
    path = model.path
    try:
        part = splits.parse(path.name)
    except BadGguf as error:
        raise PullFailed(f"{path} cannot be served: {error}.") from error
    files = [path.with_name(name) for name in part.all_parts] if part else [path]
    for file in files:
        if not file.is_file():
            raise PullFailed(f"There is no file {file}.")
    links = [folder / name for name in splits.names(model.id, len(files))]
    links[0].parent.mkdir(parents=True, exist_ok=True)
    for target, file in zip(links, files, strict=True):
        target.symlink_to(file.resolve())
    return links


class RunningPull:
    """A download that one or several watch.  It is cancelled when nobody does any more, unless it
    is finishing: a file that has its name is served, whether somebody still watches or not."""

    def __init__(self, copy: Transfer | Download, work: Coroutine[Any, Any, None]) -> None:
        self.copy = copy
        self.task = asyncio.create_task(work)
        self.task.add_done_callback(ignore_exception)
        self._watchers = 0

    async def watch(self, seconds: float) -> AsyncGenerator[None, None]:
        """Return at once, then after so many seconds each, until it has ended; then `task` has the
        result."""
        self._watchers += 1
        try:
            while not self.task.done():
                yield
                await asyncio.wait({self.task}, timeout=seconds)
        finally:
            self._watchers -= 1
            if not self._watchers:
                if not self.copy.finishing:
                    self.task.cancel()
                await asyncio.wait({self.task})


class Pulls:
    """The pulls that run, by the model's id."""

    def __init__(self) -> None:
        self._running: dict[str, RunningPull] = {}

    def running(self, model_id: str) -> RunningPull | None:
        return self._running.get(model_id)

    def start(self, transfer: Transfer, work: Coroutine[Any, Any, None]) -> RunningPull:
        """Start a pull, which is watched at once."""
        model_id = transfer.record.id
        pull = self._running[model_id] = RunningPull(transfer, work)
        pull.task.add_done_callback(lambda _: self._running.pop(model_id, None))
        return pull
