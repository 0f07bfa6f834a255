"""What all endpoints share that run a model: read the body, admit, start, listen, stream."""

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
from starlette.responses import Response
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
from pinaivu_box.server import envelope
from pinaivu_box.server.auth import key_of, require_account
from pinaivu_box.server.bodies import Bodies, leave
from pinaivu_box.server.stream import EventStream

STRICT = "x-pinaivu-strict"
TIMEOUT = "x-request-timeout"
_LONGEST_TIMEOUT = 86400.0  # seconds, as in the body

Body = TypeVar("Body", bound=msgspec.Struct)
T = TypeVar("T")


class InferenceCall:
    """One call of the API that runs a model: who asks, and the request once it is started."""

    def __init__(self, request: Request) -> None:
        require_account(request)
        self.box: Box = request.app.state.box
        self.bodies: Bodies = request.app.state.bodies
        self.key = key_of(request)
        self.request_id: str = request.scope["state"]["request_id"]
        self.created_at = int(time.time())
        self._since = time.monotonic()
        self.ignored: list[str] = []
        self._if_thoughtless = ""
        self._timeout: float | None = None
        self._keep_alive: float | None = None
        self._request = request
        self._arrival: ArrivedRequest | None = None
        self._watcher: asyncio.Task[None]  # once it is started

    async def body(self, kind: type[Body]) -> Body:
        """The decoded body; `ignored` then names what of it was passed over, and so does the header
        `x-pinaivu-ignored`.

        From here on the call counts as one of the key's requests.  Raises RateLimited if it has
        none left, before anything is read, and what `Bodies.receive` does.
        """
        state, key = self._request.scope["state"], self.key
        self._arrival = state["arrival"] = await self.box.admission.arrive(key)
        strict = self._request.headers.get(STRICT) == "1" or key.policy.strict
        most = self.box.config.server.max_body_bytes
        body, self.ignored = await self.bodies.receive(
            self._request, key.account_id, kind, most, strict=strict
        )
        self._keep_alive = _keep_alive(getattr(body, "keep_alive", None))
        if self._keep_alive is not None and self._keep_alive > self.box.placement.longest:
            if strict:
                raise InvalidBody(
                    "it is longer than this box keeps a model loaded ([engine] max_keep_alive)",
                    loc=("body", "keep_alive"),
                )
            self.ignored.append("keep_alive")
        state["ignored"] = self.ignored
        self._timeout = _timeout(self._request, getattr(body, "pinaivu", None))
        return body

    def wants_thoughts(self, field: str) -> None:
        """That field of the body asks for thoughts: it is passed over if the model has none."""
        self._if_thoughtless = field

    async def make_room(self, size: int) -> None:
        """For so many bytes that are read beside the body; see `Bodies.make_room`."""
        most = self.box.config.server.max_body_bytes
        await self.bodies.make_room(self._request, self.key.account_id, size, most)

    def admit(self, model_id: str) -> Model:
        model = self.box.admission.check(model_id, self.key, self.box.requests.in_flight)
        self._request.scope["state"]["model"] = model.id
        return model

    async def tokenize(
        self,
        job: Job,
        tokens: list[int] | None = None,
        *,
        plain: bool = False,
        count: bool = False,
    ) -> Tokenized:
        """See `gateway.local.LocalBackend.tokenize`; raises InvalidBody for what is too large."""
        check_sizes(job.tools, job.constraint, job.stop)
        job = under(self.key, job)
        return await self._unless_left(
            self.box.prompts.tokenize(job, tokens, plain=plain, count=count)
        )

    async def read(self, job: Job) -> tuple[Job, int]:
        """The job with its prompt's tokens, and the context of its model.  Raises as `tokenize`,
        and ContextOverflow for a prompt that is far too long."""
        check_sizes(job.tools, job.constraint, job.stop)
        return await self._unless_left(self.box.prompts.read(under(self.key, job)))

    async def _unless_left(self, answer: Coroutine[Any, Any, T]) -> T:
        reading = asyncio.create_task(answer)
        leaving = asyncio.create_task(disconnected(self._request.receive))
        try:
            await asyncio.wait({reading, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if leaving.done() or not reading.done():  # that it left is told only once
                raise BadRequest("The connection closed before the answer was there.")
            return reading.result()
        finally:
            reading.cancel()
            leaving.cancel()

    async def start(self, jobs: list[Job], *, background: bool = False) -> Running:
        """In the `background` it goes on when the client leaves.  Raises what admission does,
        TooLate, and InvalidBody for what is too large."""
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
        self._request.scope["state"]["logged"] = True  # from here on the request logs itself
        if not background:
            watching = _cancel_on_disconnect(self._request.receive, running)
            self._watcher = asyncio.create_task(watching)
        return running

    def failed(self, error: ApiError) -> Failed:
        """Counts an error that ends what has begun to be answered; as the client is told of it."""
        envelope.note(self._request, error)
        contact, path = self.box.config.server.contact, self._request.url.path
        return Failed(envelope.told(error, contact, path))

    async def collect(self, running: Running) -> AsyncIterator[RequestEvent]:
        """All events up to Finished; raises what failed."""
        try:
            while True:
                for event in await running.events.take():
                    leave(self._request)
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
    ) -> Response:
        """Sends what `encode` makes of the events, as many at a time as have piled up; before the
        last, `settle` has done what that promises."""
        first = asyncio.create_task(_first(running))
        # A failure before the first token keeps its own status; a long wait (the engine is loading,
        # or the queue is long) is bridged with comments after the grace.
        await asyncio.wait({first}, timeout=self.box.config.server.stream_grace_seconds)
        if first.done() and isinstance(event := first.result()[-1], Failed):
            self._watcher.cancel()
            raise event.error
        if first.done():
            leave(self._request)
            self.note(first.result()[0])
        return EventStream(self._chunks(running, first, encode, settle), self._watcher)

    def note(self, event: RequestEvent) -> None:
        """What headers tell of it."""
        if not isinstance(event, ChoiceStarted):
            return
        if event.route:
            self._request.scope["state"]["route"] = event.route
        if self._if_thoughtless and not event.thinks:
            self.ignored.append(self._if_thoughtless)
            self._if_thoughtless = ""

    async def _chunks(
        self,
        running: Running,
        first: asyncio.Task[list[RequestEvent]],
        encode: Callable[[Sequence[RequestEvent]], bytes],
        settle: Callable[[Finished], Awaitable[None]] | None,
    ) -> AsyncIterator[bytes]:
        events = await first
        leave(self._request)
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
    """The events up to the first that shows whether it goes well."""
    events = await running.events.take()
    while isinstance(events[-1], ChoiceStarted):
        events = [*events, *await running.events.take()]
    return events


def _timeout(request: Request, extension: Extension | None) -> float | None:
    """Seconds in which the request wants to start; the body's word counts most."""
    if extension is not None and extension.timeout is not None:
        return extension.timeout
    given = request.headers.get(TIMEOUT)
    if given is None:
        return None
    try:
        seconds = parse_duration(given)
    except ValueError as error:
        raise InvalidBody(str(error), loc=("header", TIMEOUT)) from None
    if not 0 < seconds <= _LONGEST_TIMEOUT:
        raise InvalidBody("it must be longer than nothing, and at most 1d", loc=("header", TIMEOUT))
    return seconds


def _keep_alive(given: float | str | None) -> float | None:
    """Seconds; what is below 0 has no end.  Raises InvalidBody."""
    try:
        if isinstance(given, str):  # Ollama's clients also write 1h30m
            given = sum(map(parse_duration, re.split("(?<=[a-z])(?=[0-9])", given)))
    except ValueError as error:
        raise InvalidBody(str(error), loc=("body", "keep_alive")) from None
    return math.inf if given is not None and given < 0 else given


async def disconnected(receive: Receive) -> None:
    """Returns once the client has left."""
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
