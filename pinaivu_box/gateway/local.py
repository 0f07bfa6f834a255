"""The backend that serves with an engine on this machine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import replace

import msgspec

from pinaivu_box.config import SamplingConfig
from pinaivu_box.engine.messages import (
    Add,
    Admitted,
    Embed,
    Output,
    Refused,
    Sampling,
    SamplingDefaults,
    Tokenize,
    Tokenized,
)
from pinaivu_box.errors import EngineLost, by_code
from pinaivu_box.gateway.backend import Event, Job, Prompt, Started
from pinaivu_box.gateway.engine_process import EngineProcess, Item
from pinaivu_box.gateway.placement import Placement
from pinaivu_box.models.catalog import Model
from pinaivu_box.receipts.receipt import EngineBuild
from pinaivu_box.settings import LiveSettings


class LocalBackend:
    def __init__(self, placement: Placement, node_id: str, settings: LiveSettings) -> None:
        self._placement = placement
        self._node_id = node_id
        self._settings = settings

    def start(self, job: Job) -> LocalLeg:
        return LocalLeg(job, self._placement, self._node_id, self._settings)

    async def tokenize(
        self,
        job: Job,
        tokens: list[int] | None = None,
        *,
        plain: bool = False,
        count: bool = False,
    ) -> Tokenized:
        """The tokens of the job's prompt, or the text of `tokens`; see `engine.messages`."""
        return (await self.ask(job, tokens, plain=plain, count=count))[0]

    async def read(self, job: Job) -> tuple[Job, int]:
        """The job with its prompt's tokens, and the context of its model."""
        try:
            prompt, context = await self.ask(job)
        except EngineLost:  # another serves it, as it would a request that runs
            prompt, context = await self.ask(job)
        return replace(job, read=prompt.tokens, thinking=prompt.thinking), context

    async def ask(
        self,
        job: Job,
        tokens: list[int] | None = None,
        *,
        plain: bool = False,
        count: bool = False,
    ) -> tuple[Tokenized, int]:
        """As `tokenize`, and the context of the model.  If it is cancelled, the engine need not go
        on; but an engine that is starting does, as others may wait for it."""
        engine = await self._acquired(job.model)
        answered = False
        try:
            sampling = resolve(job, self._settings.config.sampling, engine.ready.defaults)
            add = to_add(job, sampling)
            mailbox = engine.ask(Tokenize(add, tokens, plain, job.inputs, count))
            (item,) = await mailbox.take()
            answered = True
            if isinstance(item, Tokenized):
                return item, engine.ready.context
            if isinstance(item, Refused):
                raise by_code(item.code, item.message, item.param)
            raise EngineLost("The engine died while it worked on this request; try again.")
        finally:
            if not answered:
                engine.cancel(job.id)
            engine.forget(job.id)
            self._placement.release(engine, job.tenant)

    async def _acquired(self, model: Model) -> EngineProcess:
        acquiring = asyncio.ensure_future(self._placement.acquire(model))
        try:
            return await asyncio.shield(acquiring)
        except asyncio.CancelledError:
            acquiring.add_done_callback(self._give_back)
            raise

    def _give_back(self, acquired: asyncio.Future[EngineProcess]) -> None:
        """Nobody waits for that engine any more."""
        if not acquired.cancelled() and acquired.exception() is None:
            self._placement.release(acquired.result())


class LocalLeg:
    """See `gateway.backend.Leg`."""

    def __init__(
        self, job: Job, placement: Placement, node_id: str, settings: LiveSettings
    ) -> None:
        self._job, self._placement = job, placement
        self._node_id, self._settings = node_id, settings
        self._engine: EngineProcess | None = None  # once it has the job
        self._cancelled = False

    def cancel(self) -> None:
        if not self._cancelled and self._engine is not None:
            self._engine.cancel(self._job.id)
        self._cancelled = True

    def _is_cancelled(self) -> bool:
        """It may be since it was last asked."""
        return self._cancelled

    async def events(self) -> AsyncGenerator[Event]:
        job = self._job
        if self._is_cancelled():
            return
        engine = await self._placement.acquire(job.model)
        ended = False
        try:
            ready = engine.ready
            defaults = self._settings.config.sampling
            sampling = job.settled or resolve(job, defaults, ready.defaults)
            mailbox = engine.submit(to_add(job, sampling) if job.inputs is None else to_embed(job))
            self._engine = engine
            if self._is_cancelled():
                engine.cancel(job.id)
            yield Started(
                self._node_id,
                engine.model_digest,
                EngineBuild(ready.build, ready.device),
                sampling,
                ready.tool_style,
                ready.thinks,
            )
            while True:
                for item in await mailbox.take():
                    ended = isinstance(item, Output) and item.finish_reason is not None
                    yield _event(item)
                    if ended:
                        return
        finally:
            if not ended:
                engine.cancel(job.id)
            engine.forget(job.id)
            self._placement.release(engine, job.tenant, job.keep_alive)


def to_embed(job: Job) -> Embed:
    return Embed(job.id, job.inputs or [], job.dimensions, job.tenant, job.weight, job.priority)


def to_add(job: Job, sampling: Sampling) -> Add:
    return Add(
        id=job.id,
        messages=job.messages,
        sampling=sampling,
        max_tokens=job.max_tokens,
        stop=job.stop,
        tenant=job.tenant,
        output=job.output,
        priority=job.priority,
        prompt=job.prompt,
        tools=job.tools,
        template=job.template,
        constraint=job.constraint,
        logprobs=job.logprobs,
        prediction=job.prediction,
        scope=job.scope if job.cache else "",
        named=job.named,
        suffix=job.suffix,
        weight=job.weight,
        read=job.read,
        thinking=job.thinking,
        echo=job.echo,
        scored=job.scored,
        unsaid=job.unsaid,
    )


def _event(item: Item) -> Event:
    """Raises what the engine refused with, EngineLost if it is gone."""
    match item:
        case Output():
            return item
        case Admitted():
            return Prompt(item.prompt_tokens, item.thinking, item.text)
        case Refused():
            raise by_code(item.code, item.message, item.param)
        case _:
            raise EngineLost("The engine died while it worked on this request; try again.")


def resolve(job: Job, box: SamplingConfig, file: SamplingDefaults) -> Sampling:
    """The request's word counts most, then the model's and the box's configuration, the file's.

    A client that sets `top_p` truncates as OpenAI's API does, by top-p alone: the top-k and min-p
    defaults, which it does not know of, are off then.
    """
    layers = (file, box, job.model.sampling, job.sampling)
    fields = [item for layer in layers for item in msgspec.structs.asdict(layer).items()]
    values = {name: value for name, value in fields if value is not None}
    if job.sampling.top_p is not None:
        values["top_k"] = job.sampling.top_k or 0
        values["min_p"] = job.sampling.min_p or 0.0
    return Sampling(**values)
