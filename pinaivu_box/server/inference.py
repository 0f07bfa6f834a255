"""What all endpoints that run a model share: read the body, admit, start, collect or stream."""

from __future__ import annotations

import asyncio
import math
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request
from starlette.types import Receive

from pinaivu_box.box import Box
from pinaivu_box.config import parse_duration
from pinaivu_box.engine.messages import Tokenized
from pinaivu_box.errors import ApiError, BadRequest, InvalidBody
from pinaivu_box.gateway.admission import ArrivedRequest, under
from pinaivu_box.gateway.backend import Job
from pinaivu_box.gateway.request import ChoiceStarted, Failed, Finished, RequestEvent, too_late
from pinaivu_box.gateway.request import Request as Running
from pinaivu_box.gateway.sizes import check_sizes
from pinaivu_box.models.catalog import Model
from pinaivu_box.openai.types import Extension, PromptTokensDetails, Usage
from pinaivu_box.server import error_responses
from pinaivu_box.server.auth import key_of, require_account
from pinaivu_box.server.bodies import Bodies, release_body
from pinaivu_box.server.sse import EventStream

STRICT_HEADER = "x-pinaivu-strict"
TIMEOUT_HEADER = "x-request-timeout"
_MAX_TIMEOUT_SECONDS = 86400.0  # as in the body

Body = TypeVar("Body", bound=msgspec.Struct)
T = TypeVar("T")


class InferenceCall:
    """One API call that runs a model: its key and body, and the running request.

    `ignored` names the fields of the body that had no effect.
    """

    def __init__(self, request: Request) -> None:
        require_account(request)
        self.box: Box = request.app.state.box
        self.bodies: Bodies = request.app.state.bodies
        self.key = key_of(request)
        self.request_id: str = request.scope["state"]["request_id"]
        self.created_at = int(time.time())
        self._since = time.monotonic()
        self.ignored: list[str] = []
        self._thinking_field = ""
        self._timeout: float | None = None
        self._keep_alive: float | None = None
        self.request = request
        self._arrival: ArrivedRequest | None = None
        self._watcher: asyncio.Task[None]  # once it is started

    async def body(self, kind: type[Body]) -> Body:
        """The decoded body.  Fills `ignored`, which is also the header `x-pinaivu-ignored`.

        Counts the call against the key's request limit first.  Raises RateLimited if that is
        reached, and what `Bodies.receive` does.
        """
        state, key = self.request.scope["state"], self.key
        self._arrival = state["arrival"] = await self.box.admission.arrive(key)
        strict = self.request.headers.get(STRICT_HEADER) == "1" or key.policy.strict
        max_bytes = self.box.config.server.max_body_bytes
        body, self.ignored = await self.bodies.receive(
            self.request, key.account_id, kind, max_bytes, strict=strict
        )
        self._keep_alive = _keep_alive(getattr(body, "keep_alive", None))
        if self._keep_alive is not None and self._keep_alive > self.box.placement.max_keep_alive:
            if strict:
                raise InvalidBody(
                    "it is longer than [engine] max_keep_alive of this box",
                    loc=("body", "keep_alive"),
                )
            self.ignored.append("keep_alive")
        state["ignored"] = self.ignored
        self._timeout = _timeout(self.request, getattr(body, "pinaivu", None))
        return body

    def asks_for_thinking(self, field: str) -> None:
        """Note the field that asks the model to think: it is ignored if the model cannot."""
        self._thinking_field = field

    async def reserve_history(self, size: int) -> None:
        """See `Bodies.reserve_history`."""
        max_bytes = self.box.config.server.max_body_bytes
        await self.bodies.reserve_history(self.request, self.key.account_id, size, max_bytes)

    def admit(self, model_id: str) -> Model:
        """The model with that name.  Raises what `Admission.check` does."""
        model = self.box.admission.check(model_id, self.key, self.box.requests.in_flight)
        self.request.scope["state"]["model"] = model.id
        return model

    async def tokenize(
        self,
        job: Job,
        tokens: list[int] | None = None,
        *,
        plain: bool = False,
        count: bool = False,
    ) -> Tokenized:
        """See `gateway.local.LocalBackend.tokenize`.  Raises InvalidBody for what is too large."""
        check_sizes(job.tools, job.constraint, job.stop)
        job = under(self.key, job)
        return await self._until_disconnected(
            self.box.prompt_reader.tokenize(job, tokens, plain=plain, count=count)
        )

    async def read(self, job: Job) -> tuple[Job, int]:
        """The job with its prompt's tokens, and the context length of its model.  Raises what
        `tokenize` does, and ContextOverflow for a prompt that is far too long."""
        check_sizes(job.tools, job.constraint, job.stop)
        return await self._until_disconnected(self.box.prompt_reader.read(under(self.key, job)))

    async def _until_disconnected(self, coroutine: Coroutine[Any, Any, T]) -> T:
        result = asyncio.create_task(coroutine)
        disconnect = asyncio.create_task(disconnected(self.request.receive))
        try:
            await asyncio.wait({result, disconnect}, return_when=asyncio.FIRST_COMPLETED)
            if disconnect.done() or not result.done():  # a disconnect is reported only once
                raise BadRequest("The connection closed before the answer was ready.")
            return result.result()
        finally:
            result.cancel()
            disconnect.cancel()

    async def start(self, jobs: list[Job], *, background: bool = False) -> Running:
        """Start the request; in the `background` it goes on when the client disconnects.  Raises
        what admission does, TooLate, and InvalidBody for what is too large."""
        for job in jobs:
            check_sizes(job.tools, job.constraint, job.stop)
        jobs = [replace(job, keep_alive=self._keep_alive) for job in jobs]
        requests, began = self.box.requests, time.monotonic()
        try:
            async with asyncio.timeout(self._timeout):
                admitted = await self.box.admission.admit(
                    self.key, jobs, requests.in_flight, self._arrival
                )
        except TimeoutError:
            waited = time.monotonic() - began
            raise too_late(waited, self._timeout or waited) from None
        waited = time.monotonic() - began
        running = requests.start(admitted, self._timeout, waited, self._since)
        self.request.scope["state"]["logged"] = True  # the request logs itself
        if not background:
            watch = _cancel_on_disconnect(self.request.receive, running)
            self._watcher = asyncio.create_task(watch)
        return running

    def failed(self, error: ApiError) -> Failed:
        """Count an error that ends an answer that has begun; returns it as the client sees it."""
        error_responses.count(self.request, error)
        contact, path = self.box.config.server.contact, self.request.url.path
        return Failed(error_responses.adapted(error, contact, path))

    async def collect(self, running: Running) -> AsyncIterator[RequestEvent]:
        """Yields all events up to Finished.  Raises the error of Failed."""
        try:
            while True:
                for event in await running.events.take():
                    release_body(self.request)
                    if isinstance(event, Failed):
                        raise event.error
                    self.note(event)
                    yield event
                    if isinstance(event, Finished):
                        return
        finally:
            self._watcher.cancel()

    async def stream(
        self,
        running: Running,
        encode: Callable[[Sequence[RequestEvent]], bytes],
        settle: Callable[[Finished], Awaitable[None]] | None = None,
    ) -> EventStream:
        """Streams what `encode` makes of the events, as many at a time as have arrived; `settle` is
        awaited before the last.  Raises the error of a request that fails before its first output.
        """
        first = asyncio.create_task(_first(running))
        # A failure before the first token keeps its own status.  After the grace period a long wait
        # (the engine is loading, or the queue is long) is bridged with comments.
        await asyncio.wait({first}, timeout=self.box.config.server.stream_grace_seconds)
        if first.done() and isinstance(event := first.result()[-1], Failed):
            self._watcher.cancel()
            raise event.error
        if first.done():
            release_body(self.request)
            self.note(first.result()[0])
        return EventStream(self._chunks(running, first, encode, settle), self._watcher)

    def note(self, event: RequestEvent) -> None:
        """Set the headers that depend on the first event of a choice."""
        if not isinstance(event, ChoiceStarted):
            return
        if event.route:
            self.request.scope["state"]["route"] = event.route
        if self._thinking_field and not event.thinks:
            self.ignored.append(self._thinking_field)
            self._thinking_field = ""

    async def _chunks(
        self,
        running: Running,
        first: asyncio.Task[list[RequestEvent]],
        encode: Callable[[Sequence[RequestEvent]], bytes],
        settle: Callable[[Finished], Awaitable[None]] | None,
    ) -> AsyncIterator[bytes]:
        events = await first
        release_body(self.request)
        self.note(events[0])
        while True:
            if settle is not None and isinstance(end := events[-1], Finished):
                if data := encode(events[:-1]):
                    yield data
                await settle(end)
                events = [end]
            if isinstance(last := events[-1], Failed):
                events = [*events[:-1], self.failed(last.error)]
            if data := encode(events):
                yield data
            if isinstance(events[-1], Finished | Failed):
                return
            events = await running.events.take()


async def _first(running: Running) -> list[RequestEvent]:
    """The events up to the first output or failure."""
    events = await running.events.take()
    while isinstance(events[-1], ChoiceStarted):
        events = [*events, *await running.events.take()]
    return events


def _timeout(request: Request, extension: Extension | None) -> float | None:
    """Seconds within which the request has to start; the body takes precedence over the header.
    Raises InvalidBody."""
    if extension is not None and extension.timeout is not None:
        return extension.timeout
    text = request.headers.get(TIMEOUT_HEADER)
    if text is None:
        return None
    try:
        seconds = parse_duration(text)
    except ValueError as error:
        raise InvalidBody(str(error), loc=("header", TIMEOUT_HEADER)) from None
    if not 0 < seconds <= _MAX_TIMEOUT_SECONDS:
        raise InvalidBody("it must be more than 0 and at most 1d", loc=("header", TIMEOUT_HEADER))
    return seconds


def _keep_alive(value: float | str | None) -> float | None:
    """Seconds; a negative value stands for ever.  Raises InvalidBody."""
    try:
        if isinstance(value, str):  # Ollama's clients also write 1h30m
            value = sum(map(parse_duration, re.split("(?<=[a-z])(?=[0-9])", value)))
    except ValueError as error:
        raise InvalidBody(str(error), loc=("body", "keep_alive")) from None
    return math.inf if value is not None and value < 0 else value


async def disconnected(receive: Receive) -> None:
    """Returns once the client has disconnected."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancel_on_disconnect(receive: Receive, running: Running) -> None:
    await disconnected(receive)
    running.cancel()


def usage_of(end: Finished) -> Usage:
    return Usage(
        prompt_tokens=end.prompt_tokens,
        completion_tokens=end.completion_tokens,
        total_tokens=end.prompt_tokens + end.completion_tokens,
        prompt_tokens_details=PromptTokensDetails(end.cached_tokens),
    )
