"""A leg at an upstream: see `gateway.backend.Leg`.

It has no tokens, so nobody goes on with it: what is lost before the first output may be asked of
another, and what is lost after it ends the request.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from pinaivu_box.engine.messages import Output, Prompt, Sampling
from pinaivu_box.errors import ApiError, InternalError, UpstreamFailed, UpstreamLost
from pinaivu_box.gateway.backend import Counted, Event, Job, Started, UpstreamModel
from pinaivu_box.gateway.mailbox import Mailbox
from pinaivu_box.receipts.receipt import EngineBuild, upstream_digest
from pinaivu_box.tasks import ignore_exception
from pinaivu_box.upstream.answer import (
    BadAnswer,
    StreamedAnswer,
    estimate_prompt,
    read_embeddings,
)
from pinaivu_box.upstream.request import body_of, path_of, sent_of

if TYPE_CHECKING:
    from pinaivu_box.upstream.upstream import Upstream

log = logging.getLogger("pinaivu.upstream")

_STYLE = "tags"  # that of `answer`


@dataclass(frozen=True)
class _Asked:
    """It has its place, after so many milliseconds, and was asked."""

    queue_ms: float


class _End:
    """The upstream has said all."""


class _Stop:
    """The leg was cancelled."""


_Item = _Asked | bytes | ApiError | _End | _Stop


class LegAtUpstream:
    """`model` is the name of the job's model there."""

    def __init__(self, upstream: Upstream, job: Job, model: str, node_id: str) -> None:
        self._upstream, self._job, self._node_id = upstream, job, node_id
        self._model = model
        self._mailbox: Mailbox[_Item] = Mailbox()
        self._cancelled = False
        self._queue_ms: float | None = None  # until it is said
        self._asked = self._begun = False
        self._deadline: float | None = None  # of the event loop, for more of the answer
        self._answer = StreamedAnswer(job)

    def cancel(self) -> None:
        self._cancelled = True
        self._mailbox.put(_Stop())

    async def run(self, take: Callable[[Event], None]) -> None:
        if self._cancelled:
            return
        openai_only = self._upstream.config.openai_only
        body = body_of(self._job, self._model, openai_only=openai_only)
        reading = asyncio.create_task(self._read(body))
        reading.add_done_callback(ignore_exception)
        try:
            await self._listen(take)
        finally:
            reading.cancel()  # closes its stream at once
            await asyncio.wait([reading])

    async def _read(self, body: dict[str, object]) -> None:
        came, job = time.monotonic(), self._job
        try:
            async with self._upstream.places.one(job.tenant, job.weight, job.priority):
                self._mailbox.put(_Asked((time.monotonic() - came) * 1000))
                async with self._upstream.client.ask(path_of(job), body, job.trace) as events:
                    async for data in events:
                        self._mailbox.put(data)
            self._mailbox.put(_End())
        except ApiError as error:
            self._mailbox.put(error)
        except Exception:
            log.exception("a leg at the upstream %s failed", self._upstream.name)
            self._mailbox.put(InternalError("The box failed on this request; its log says why."))

    async def _listen(self, take: Callable[[Event], None]) -> None:
        try:
            while True:
                for item in await self._next():
                    ended = isinstance(item, _End | _Stop)
                    for event in self._handle(item):
                        take(event)
                        ended |= isinstance(event, Output) and event.finish_reason is not None
                    if ended:
                        return
        except (ApiError, BadAnswer) as error:
            if self._begun:
                take(self._answer.counted)
            if isinstance(error, BadAnswer):
                kind = UpstreamFailed if error.of_request else UpstreamLost
                raise self._upstream.client.lost(str(error), kind) from None
            raise

    def _handle(self, item: _Item) -> Sequence[Event]:
        """The events of an item.  Raises ApiError, BadAnswer."""
        match item:
            case bytes():
                return self._take(item)
            case _Asked(queue_ms):
                self._asked, self._queue_ms = True, queue_ms
                self._wait(self._upstream.config.first_token_seconds)
                return ()
            case _Stop():
                if not self._asked:
                    return ()
                # The upstream has had the prompt, and may be paid for it.
                begin = [] if self._begun else self._begin(self._answer.counted)
                return [*begin, *self._end(Output("", [], "cancelled"))]
            case _End() if not self._is_whole():
                raise BadAnswer("cut its answer short")
            case _End():
                return self._end(self._answer.last()) if self._job.inputs is None else ()
            case ApiError():
                raise item

    def _end(self, last: Output) -> Sequence[Event]:
        return [self._answer.counted, self._first(last)]

    async def _next(self) -> list[_Item]:
        try:
            async with asyncio.timeout_at(self._deadline):
                return await self._mailbox.take()
        except TimeoutError:
            config = self._upstream.config
            limit = config.stall_seconds if self._begun else config.first_token_seconds
            return [self._upstream.client.lost(f"said nothing for {limit:g} s")]

    def _wait(self, seconds: float) -> None:
        self._deadline = asyncio.get_running_loop().time() + seconds

    def _take(self, data: bytes) -> list[Event]:
        """The events of a chunk.  Raises BadAnswer."""
        if self._job.inputs is not None:
            return self._vectors(data, self._job.inputs)
        output = self._answer.take(data)
        events: list[Event] = [] if self._begun else self._begin(self._answer.counted)
        if output is not None:
            self._wait(self._upstream.config.stall_seconds)
            events.append(self._first(output))
        return events

    def _vectors(self, data: bytes, inputs: list[str | list[int]]) -> list[Event]:
        vectors, counted = read_embeddings(data, len(inputs), estimate_prompt(self._job))
        end = Output("", [], "stop")
        end.vectors = vectors
        return [*self._begin(counted), self._first(end)]

    def _begin(self, counted: Counted) -> list[Event]:
        self._begun = True
        upstream, job = self._upstream, self._job
        values = {
            name: value
            for name, value in msgspec.structs.asdict(job.sampling).items()
            if value is not None
        }
        started = Started(
            self._node_id,
            upstream_digest(job.model.id),
            EngineBuild(self._answer.fingerprint or upstream.name, "upstream"),
            Sampling(**values),
            _STYLE,
            thinks=True,
            upstream=UpstreamModel(upstream.name, self._model),
            sent=sent_of(job, openai_only=upstream.config.openai_only),
        )
        echo = job.prompt if job.echo and isinstance(job.prompt, str) else ""
        return [started, counted, Prompt([], text=echo)]

    def _first(self, output: Output) -> Output:
        """With the time in the queue, if it is the first."""
        output.queue_ms, self._queue_ms = self._queue_ms, None
        return output

    def _is_whole(self) -> bool:
        return self._begun and (
            self._job.inputs is not None or self._answer.finish_reason is not None
        )
