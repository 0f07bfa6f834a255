"""The model that a pull makes: its name on this box, and how its files come to be served."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, suppress
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

from pinaivu_box.box import Box
from pinaivu_box.errors import Conflict, CopyFailed, PeeringError, PullFailed
from pinaivu_box.files import store as file_store
from pinaivu_box.files.download import Download
from pinaivu_box.model_admin.progress import PullProgress, State, license_of, sources_of
from pinaivu_box.models import catalog
from pinaivu_box.models.catalog import Model
from pinaivu_box.models.model_copy import copy_model
from pinaivu_box.models.names import printable
from pinaivu_box.models.record import ModelRecord
from pinaivu_box.registry import pulls
from pinaivu_box.registry.pulls import RunningPull
from pinaivu_box.registry.reference import LocalModel
from pinaivu_box.store import audit
from pinaivu_box.store.audit import Actor
from pinaivu_box.store.database import SqlStatement

if TYPE_CHECKING:
    from pinaivu_box.registry.client import RegistryClient
    from pinaivu_box.registry.transfer import Transfer

_PROGRESS_SECONDS = 0.5


async def present(box: Box, digest: str, size: int) -> Model | None:
    """Return the model with that file, if this box has it.  Files of other sizes are not read."""
    for model in box.catalog.models:
        with suppress(OSError):  # deleted since
            if model.size == size and await box.digests.of(model) == digest:
                return model
    return None


@dataclass(frozen=True)
class Target:
    """A pull of a file that gets the name `model` on this box; `actor` asked for it."""

    box: Box
    model: str
    actor: Actor
    request_id: str

    def check_name_is_free(self) -> None:
        """Raises Conflict if another file has the name."""
        names = {model.id for model in self.box.catalog.models}
        if names & {self.model, self.model.removesuffix(":latest")}:
            raise Conflict(
                f"This box serves another file as {self.model}: give the new one another name "
                "(--as)."
            )

    def check_is_no_alias(self) -> None:
        """Raises Conflict."""
        if (target := self.box.catalog.aliases.target_of(self.model)) is not None:
            raise Conflict(
                f"{self.model} is an alias of {target} on this box: remove it first ('pinaivu rm "
                f"{self.model}'), or give the model another name (--as)."
            )

    async def add_name(self, model: Model, record: ModelRecord | None = None) -> Model:
        """Serve a model of this box under the name as well, with what a registry says about it.
        Raises Conflict."""
        self.check_name_is_free()
        box = self.box
        folder = catalog.directory(box.config, box.home)
        try:
            targets = await asyncio.to_thread(copy_model, model, folder, self.model, record)
            await box.look_for_models()
        except OSError as error:
            reason = error.strerror or error
            raise Conflict(f"{model.id} cannot be called {self.model} too: {reason}.") from error
        for target in targets[: len(model.files)]:  # behind them comes a projector
            if why := box.catalog.not_served.get(target):
                raise Conflict(f"{printable(str(target))} exists, but cannot be served: {why}.")
        digests = [await box.digests.of(file) for file in model.files]
        await box.database.write(
            *map(file_store.named, targets, digests),
            self._record(digest=await box.digests.of(model), same_as=model.id),
        )
        return box.catalog.find(self.model)

    async def done(self, model: Model, digest: str, message: str) -> AsyncIterator[PullProgress]:
        """Return the only line of a pull that had nothing to copy."""
        size = model.size
        yield PullProgress("done", model.id, digest, size, size, [], message, self.request_id)

    async def link(self, model: LocalModel) -> tuple[Model, str, str]:
        """Serve a file of this machine where it is.  Returns what `done` says.  Raises Conflict."""
        box = self.box
        for served in box.catalog.models:
            with suppress(OSError):
                if served.id == self.model and served.path.samefile(model.path):
                    return served, "", f"This box serves that file already, as {served.id}."
        self.check_name_is_free()
        try:
            folder = catalog.directory(box.config, box.home)
            links = await asyncio.to_thread(pulls.link, model, folder)
        except (PullFailed, OSError) as error:
            raise Conflict(getattr(error, "message", None) or f"{error}.") from error
        await box.look_for_models()
        for path in links:
            if why := box.catalog.not_served.get(path):
                for link in links:
                    link.unlink()
                raise Conflict(f"{printable(str(model.path))} cannot be served: {why}.")
        noted = audit.note(self.actor, "model.pull", self.model, path=str(model.path))
        await box.database.write(noted)
        served = box.catalog.find(self.model)
        return served, "", f"{self.model} is served from {printable(str(model.path))}."

    async def download(self, client: RegistryClient, copy: Transfer) -> AsyncIterator[PullProgress]:
        """Return the progress of a pull by name, which others may watch too."""
        running = self.box.pulls.running(self.model)
        if running is None:
            running = self.box.pulls.start(copy, self._download(client, copy))
        else:  # somebody was quicker
            await client.aclose()
        async for line in self.watch(running):
            yield line

    async def _download(self, client: RegistryClient, copy: Transfer) -> None:
        """Raises PullFailed, CopyFailed."""
        async with client:
            await self.run(copy)

    async def watch(self, running: RunningPull) -> AsyncIterator[PullProgress]:
        """Return its progress.  If nobody reads it any more, it stops; what has been copied
        stays."""
        copy = running.copy
        async with aclosing(running.watch(_PROGRESS_SECONDS)) as ticks:
            async for _ in ticks:
                yield self._line(copy, "checking" if copy.checking else "copying")
        try:
            running.task.result()
        except (PeeringError, PullFailed) as error:
            yield self._line(copy, "failed", error.message)
        else:
            yield self._line(copy, "done")

    async def run(self, copy: Download | Transfer) -> None:
        """Copy the model and serve it.  Raises CopyFailed, PullFailed."""
        await copy.run()
        box = self.box
        names = sorted(source.name for source in copy.sent)
        await box.database.write(
            *chain.from_iterable(file_store.copied(*file) for file in copy.files),
            self._record(digest=copy.digest, **{"from": names}),
        )
        await box.look_for_models()
        for target, *_ in copy.files:
            if target != copy.projector and (why := box.catalog.not_served.get(target)):
                raise CopyFailed(f"{target} exists, but cannot be served: {why}.")

    def _line(self, copy: Download | Transfer, state: State, message: str = "") -> PullProgress:
        copied = (copy.digest, copy.size, copy.bytes)
        told = (message, self.request_id, license_of(copy))
        return PullProgress(state, self.model, *copied, sources_of(copy), *told)

    def _record(self, **detail: Any) -> SqlStatement:
        return audit.record(self.actor, "model.pull", self.model, **detail)
