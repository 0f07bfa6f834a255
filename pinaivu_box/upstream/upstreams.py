"""The upstreams of the settings in force."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress

from pinaivu_box.engine.messages import Tokenized
from pinaivu_box.errors import UnsupportedParameter
from pinaivu_box.gateway.backend import Job
from pinaivu_box.models.catalog import Model
from pinaivu_box.settings import LiveSettings
from pinaivu_box.tasks import TaskSet
from pinaivu_box.upstream.answer import estimate_prompt
from pinaivu_box.upstream.upstream import Upstream

log = logging.getLogger("pinaivu.upstream")

_FIRST_LOOK_SECONDS = 3.0
_ANSWER_TOKENS = 4096  # the longest answer that is reserved for, where the context is not known


class Upstreams:
    """`changed` is called when one of them may serve that could not before, or the other way."""

    def __init__(self, settings: LiveSettings, node_id: str) -> None:
        self.changed: Callable[[], None] = lambda: None
        self._settings, self._node_id = settings, node_id
        self._by_name: dict[str, Upstream] = {}
        self._watches: dict[str, asyncio.Task[None]] = {}
        self._closing = TaskSet()

    @property
    def all(self) -> list[Upstream]:
        return list(self._by_name.values())

    def with_model(self, model_id: str) -> list[Upstream]:
        return [upstream for upstream in self.all if model_id in upstream.models]

    def models(self) -> dict[str, Model]:
        """All their models by id; of several under one name, that of the first in the file."""
        found: dict[str, Model] = {}
        for upstream in self.all:
            for model_id in upstream.models:
                if model_id not in found:
                    found[model_id] = upstream.model(model_id)
        return found

    def tokenize(
        self, job: Job, tokens: list[int] | None = None, *, plain: bool = False
    ) -> tuple[Tokenized, int]:
        """See `gateway.backend.Tokenizer`: nobody here can tokenize it, so the number of tokens is
        an estimate.  Raises UnsupportedParameter if it is the tokens that are wanted."""
        if tokens is not None or plain:
            raise UnsupportedParameter(
                f"{job.model.id} is a model of an upstream, whose tokens are not known here",
                loc=("body", "model"),
            )
        count = estimate_prompt(job)
        model_id = job.model.id
        context = max((each.context(model_id) for each in self.with_model(model_id)), default=0)
        return Tokenized(job.id, [], count=count), context or count + _ANSWER_TOKENS

    # -- settings ----------------------------------------------------------------------------------

    async def open(self) -> None:
        """Take over the settings, and wait a moment until each has said which models it has."""
        self.reloaded()
        with suppress(TimeoutError):
            async with asyncio.timeout(_FIRST_LOOK_SECONDS):
                for upstream in self.all:
                    await upstream.looked.wait()

    def reloaded(self) -> list[Upstream]:
        """Take over the settings: an upstream with the same ones stays what it is.  Returns those
        that are new, or are others now."""
        current = self._settings.current
        before, self._by_name = self._by_name, {}
        for config in current.config.upstream:
            key, known = current.upstream_keys.get(config.name), before.get(config.name)
            if known is not None and (known.config, known.key) == (config, key):
                self._by_name[config.name] = before.pop(config.name)
            else:
                self._by_name[config.name] = Upstream(config, key, self._node_id)
        for name, upstream in before.items():
            if watch := self._watches.pop(name, None):
                watch.cancel()
            self._closing.spawn(upstream.close())
        new = [upstream for name, upstream in self._by_name.items() if name not in self._watches]
        for upstream in new:
            self._watches[upstream.name] = asyncio.create_task(self._watch(upstream))
        self.changed()
        return new

    async def _watch(self, upstream: Upstream) -> None:
        while True:
            try:
                if await upstream.look():
                    self.changed()
            except Exception:
                log.exception("the upstream %s could not be looked at", upstream.name)
                upstream.looked.set()
            await asyncio.sleep(upstream.config.health_seconds)

    async def close(self) -> None:
        for watch in self._watches.values():
            watch.cancel()
        await self._closing.cancel()
        for upstream in self.all:
            with suppress(Exception):
                await upstream.client.aclose()
