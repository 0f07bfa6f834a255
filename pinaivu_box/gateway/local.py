"""The backend that serves with an engine on this machine."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import msgspec

from pinaivu_box.config import SamplingConfig
from pinaivu_box.engine.messages import (
    Add,
    Embed,
    Output,
    Prompt,
    Refused,
    Sampling,
    SamplingDefaults,
    Tokenize,
    Tokenized,
)
from pinaivu_box.errors import ApiError, EngineLost, by_code
from pinaivu_box.gateway.backend import Event, Job, Started
from pinaivu_box.gateway.engine_process import EngineProcess, Item
from pinaivu_box.gateway.mailbox import Mailbox
from pinaivu_box.gateway.placement import Placement
from pinaivu_box.gateway.prefix_affinity import beginning_of
from pinaivu_box.models.catalog import Model
from pinaivu_box.receipts.receipt import STATISTICAL, EngineBuild
from pinaivu_box.settings import LiveSettings
from pinaivu_box.tasks import ignore_exception


class LocalBackend:
    def __init__(self, placement: Placement, node_id: str, settings: LiveSettings) -> None:
        self.placement, self.node_id, self._settings = placement, node_id, settings

    def start(self, job: Job) -> LocalLeg:
        return LocalLeg(job, self)

    def sampling(self, job: Job, engine: EngineProcess) -> Sampling:
        """How that engine draws the job's tokens."""
        return job.drawn_with or resolve(job, self._settings.config.sampling, engine.ready.defaults)

    async def tokenize(
        self,
        job: Job,
        tokens: list[int] | None = None,
        *,
        plain: bool = False,
        count: bool = False,
    ) -> tuple[Tokenized, int]:
        """See `backend.Tokenizer`.  If it is cancelled, the engine need not go on; but an engine
        that is starting does, as others may wait for it."""
        try:
            return await self._tokenize(job, tokens, plain, count)
        except EngineLost:  # another serves it, as it would a request that runs
            return await self._tokenize(job, tokens, plain, count)

    async def _tokenize(
        self, job: Job, tokens: list[int] | None, plain: bool, count: bool
    ) -> tuple[Tokenized, int]:
        engine = await self._acquired(job.model)
        answered = False
        try:
            request = request_of(job, self.sampling(job, engine))
            mailbox: Mailbox[Item] = Mailbox()
            engine.submit(Tokenize(request, tokens, plain, count), mailbox.put)
            (item,) = await mailbox.take()
            answered = True
            if isinstance(item, Tokenized):
                return item, engine.ready.context
            raise _error(item)
        finally:
            if not answered:
                engine.cancel(job.id)
            engine.forget(job.id)
            self.placement.release(engine, job.tenant, job.keep_alive)

    async def _acquired(self, model: Model) -> EngineProcess:
        acquiring = asyncio.create_task(self.placement.acquire(model))
        try:
            return await asyncio.shield(acquiring)
        except asyncio.CancelledError:
            acquiring.add_done_callback(self._give_back)
            raise

    def _give_back(self, acquired: asyncio.Future[EngineProcess]) -> None:
        """Nobody waits for that engine any more."""
        if not acquired.cancelled() and acquired.exception() is None:
            self.placement.release(acquired.result())


class LocalLeg:
    """See `gateway.backend.Leg`."""

    def __init__(self, job: Job, backend: LocalBackend) -> None:
        self._job, self._backend = job, backend
        self._engine: EngineProcess | None = None  # once it has the job
        self._cancelled = False

    def cancel(self) -> None:
        if not self._cancelled and self._engine is not None:
            self._engine.cancel(self._job.id)
        self._cancelled = True

    def _is_cancelled(self) -> bool:
        """It may be since it was last asked."""
        return self._cancelled

    async def run(self, take: Callable[[Event], None]) -> None:
        job = self._job
        if self._is_cancelled():
            return
        placement = self._backend.placement
        engine = await placement.acquire(job.model, beginning_of(job))
        items = _Items(take)
        try:
            sampling, ready = self._backend.sampling(job, engine), engine.ready
            engine.submit(request_of(job, sampling), items.receive)
            self._engine = engine
            if self._is_cancelled():
                engine.cancel(job.id)
            take(
                Started(
                    self._backend.node_id,
                    engine.model_digest,
                    EngineBuild(ready.build, ready.device),
                    sampling,
                    ready.tool_style,
                    ready.thinks,
                    # Vectors depend on others, and nothing is drawn.
                    exactness="" if job.inputs is not None else ready.exactness or STATISTICAL,
                )
            )
            await items.last
        finally:
            if not items.have_ended:
                engine.cancel(job.id)
            engine.forget(job.id)
            placement.release(engine, job.tenant, job.keep_alive)


class _Items:
    """What an engine says of a leg, which `take` gets as events.  `last` is done after the last of
    them, or has what ends the leg before it; `have_ended` says that the engine has ended it."""

    def __init__(self, take: Callable[[Event], None]) -> None:
        self.last: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.last.add_done_callback(ignore_exception)
        self.have_ended = False
        self._take = take

    def receive(self, item: Item) -> None:
        if self.last.done():  # cancelled, say
            return
        try:
            self._take(item if isinstance(item, Output) else _event(item))
        except Exception as error:
            self.last.set_exception(error)
            return
        if isinstance(item, Output) and item.finish_reason is not None:
            self.have_ended = True
            self.last.set_result(None)


# Fields of an Add that a job has as well.
_SAME = set(Add.__struct_fields__) - {"id", "sampling", "scope", "named", "read", "replay"}


def request_of(job: Job, sampling: Sampling) -> Add | Embed:
    """What an engine gets of the job."""
    if job.inputs is not None:
        return Embed(job.id, job.inputs, job.dimensions, job.tenant, job.weight, job.priority)
    same: dict[str, Any] = {name: getattr(job, name) for name in _SAME}
    same["messages"] = job.rendered
    return Add(
        id=job.id,
        sampling=sampling,
        scope=job.scope if job.cache else "",
        named=job.shared_prefixes,
        read=job.prompt_tokens,
        **same,
    )


def _event(item: Item) -> Event:
    """Raises what the engine refused with, EngineLost if it is gone."""
    if isinstance(item, Prompt):
        return item
    raise _error(item)


def _error(item: Item) -> ApiError:
    if isinstance(item, Refused):
        return by_code(item.code, item.message, item.param)
    return EngineLost("The engine died while it worked on this request; try again.")


def resolve(job: Job, box: SamplingConfig, file: SamplingDefaults) -> Sampling:
    """The request's word counts most, then the model's and the box's configuration, then what
    the model's publisher recommends, the file's.

    A client that sets `top_p` truncates as OpenAI's API does, by top-p alone: the top-k and min-p
    defaults, which it does not know of, are off then.
    """
    model = job.model
    layers = (file, model.parameters.sampling, box, model.settings.sampling, job.sampling)
    fields = [item for layer in layers for item in msgspec.structs.asdict(layer).items()]
    values = {name: value for name, value in fields if value is not None}
    if job.sampling.top_p is not None:
        values["top_k"] = job.sampling.top_k or 0
        values["min_p"] = job.sampling.min_p or 0.0
    return Sampling(**values)
