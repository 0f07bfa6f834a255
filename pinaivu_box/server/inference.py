"""What all endpoints that run a model share: read the body, admit, start, collect or stream."""

from __future__ import annotations

import asyncio
import math
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Coroutine
from dataclasses import replace
from typing import Any, Protocol, TypeVar

import msgspec
from starlette.requests import Request
from starlette.types import Receive

from pinaivu_box.box import Box
from pinaivu_box.chat_format import STYLES
from pinaivu_box.config import parse_duration
from pinaivu_box.engine.messages import Output, Tokenized
from pinaivu_box.errors import ApiError, BadRequest, InvalidBody
from pinaivu_box.gateway.admission import under
from pinaivu_box.gateway.backend import Job
from pinaivu_box.gateway.quota import Entry
from pinaivu_box.gateway.request import ChoiceStarted, Failed, Finished, RequestEvent, too_late
from pinaivu_box.gateway.request import Request as Running
from pinaivu_box.gateway.sizes import check_sizes
from pinaivu_box.openai.reader import Reader
from pinaivu_box.openai.types import (
    ContextShift,
    Extension,
    ModelRequest,
    PromptTokensDetails,
    Usage,
)
from pinaivu_box.server import error_responses
from pinaivu_box.server.auth import key_of, require_account
from pinaivu_box.server.bodies import Bodies, release_body
from pinaivu_box.server.chunks import chunk_writer
from pinaivu_box.server.images import fetches_images, with_images
from pinaivu_box.server.jobs import sampling_of
from pinaivu_box.server.sse import EventStream
from pinaivu_box.tracing.context import HEADER
from pinaivu_box.tracing.span import Kind, Span

STRICT_HEADER = "x-pinaivu-strict"
TIMEOUT_HEADER = "x-request-timeout"
_MAX_TIMEOUT_SECONDS = 86400.0  # as in the body

Body = TypeVar("Body", bound=msgspec.Struct)
T = TypeVar("T")
Stream = TypeVar("Stream", bound=EventStream)
T_co = TypeVar("T_co", covariant=True)


class AnswerBuilder(Protocol[T_co]):
    """Makes an answer of the events of a request: `whole`, or encoded for a stream."""

    def take(self, event: RequestEvent) -> object: ...

    def whole(self) -> T_co:
        """The answer once all events were taken."""
        ...

    def encode(self, event: RequestEvent) -> bytes:
        """Take an event and return what a stream says of it."""
        ...


class InferenceCall:
    """One API call that runs a model: its key and body, and the running request.

    `ignored` names the fields of the body that had no effect; `thinking_field` is the one that asks
    the model to think, which is ignored if the model cannot.
    """

    def __init__(self, request: Request) -> None:
        require_account(request)
        self.box: Box = request.app.state.box
        self.bodies: Bodies = request.app.state.bodies
        self.key = key_of(request)
        self.request_id: str = request.scope["state"]["request_id"]
        request.scope["state"]["runs_model"] = True  # see `AccessLog`
        self.trace = self.box.tracer.begin(request.headers.get(HEADER))
        request.scope["state"]["trace"] = self.trace
        self._request_trace = self.trace.child() if self.trace is not None else None
        self.created_at = int(time.time())
        self._since = time.monotonic()
        self.ignored: list[str] = []
        self.thinking_field = ""
        self._timeout: float | None = None
        self._keep_alive: float | None = None
        self.request = request
        self._counted: Entry | None = None  # as one of the key's requests per minute
        self.running: Running  # once it is started
        self._watcher: asyncio.Task[None]
        self._keeps_body = False

    async def body(self, kind: type[Body]) -> Body:
        """The decoded body.  Fills `ignored`, which is also the header `x-pinaivu-ignored`.

        Counts the call against the key's request limit first.  Raises RateLimited if that is
        reached, and what `Bodies.receive` does.
        """
        state, key = self.request.scope["state"], self.key
        self._counted = state["counted"] = await self.box.admission.count_request(key)
        strict = self.request.headers.get(STRICT_HEADER) == "1" or key.policy.strict
        max_bytes = self.box.config.server.max_body_bytes
        body, self.ignored = await self.bodies.receive(
            self.request, key.account_id, kind, max_bytes, strict=strict
        )
        self._keep_alive = keep_alive_seconds(getattr(body, "keep_alive", None))
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

    @property
    def keep_alive(self) -> float | None:
        """For how many seconds the client wants the model to stay loaded; None if it says
        nothing."""
        return self._keep_alive

    def job(self, body: ModelRequest) -> Job:
        """A job of the model that the body names, with its sampling parameters and nothing else of
        it.  Raises what `Admission.check` does."""
        model = self.box.admission.check(body.model, self.key)
        self.request.scope["state"]["model"] = model.id
        return Job(
            request_id=self.request_id,
            model=model,
            messages=[],
            sampling=sampling_of(body),
            seeded=getattr(body, "seed", None) is not None,
            max_tokens=None,
            stop=[],
            tenant=self.key.id,
            request_trace=self._request_trace,
            system=model.record.system if model.record is not None else "",
        )

    def first_fields(self, id_prefix: str, kind: str, job: Job) -> dict[str, Any]:
        """The fields of a chat or completion, and of its chunks, that are known at its beginning;
        `kind` is its `object`."""
        return {
            "id": self.request_id.replace("req_", id_prefix),
            "request_id": self.request_id,
            "created": self.created_at,
            "model": job.model.id,
            "choices": [],
            "object": kind,
        }

    async def seeing(self, job: Job) -> Job:
        """The job with the files of its images; see `with_images`."""
        return (await self._with_images([job]))[0]

    async def _with_images(self, jobs: list[Job]) -> list[Job]:
        """See `with_images`.  Raises RateLimited, NoNodesAvailable if others fetch too many."""
        if fetches_images(jobs[0].messages):
            max_bytes = self.box.config.server.max_body_bytes
            await self.bodies.reserve_images(self.request, self.key.account_id, max_bytes)
        return await with_images(self.box, self.key.policy, jobs)

    async def tokenize(
        self,
        job: Job,
        tokens: list[int] | None = None,
        *,
        plain: bool = False,
        count: bool = False,
    ) -> tuple[Tokenized, int]:
        """See `gateway.backend.Tokenizer`.  Raises InvalidBody for what is too large, and
        ContextOverflow for a prompt that is far too long."""
        check_sizes(job.tools, job.constraint, job.stop)
        job = await self.seeing(under(self.key, job))
        return await self._until_disconnected(
            self.box.admission.tokenizer.tokenize(job, tokens, plain=plain, count=count)
        )

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

    async def start(self, jobs: list[Job], *, background: bool = False) -> None:
        """Start the request; in the `background` it goes on when the client disconnects.  Raises
        what admission and `with_images` do, TooLate, and InvalidBody for what is too large."""
        for job in jobs:
            check_sizes(job.tools, job.constraint, job.stop)
        jobs = await self._with_images(jobs)
        # What was sent with them stays until the end: another leg may need it.
        self._keeps_body = bool(jobs[0].images)
        jobs = [replace(job.with_usual_stop(), keep_alive=self._keep_alive) for job in jobs]
        began = time.monotonic()
        try:
            async with asyncio.timeout(self._timeout):
                admitted = await self.box.admission.admit(self.key, jobs, self._counted)
        except TimeoutError:
            waited = time.monotonic() - began
            raise too_late(waited, self._timeout or waited) from None
        if self.trace is not None:
            context, now = self.trace.child(), time.time()
            self.box.tracer.add(Span(context, "admission", Kind.INTERNAL, self.trace.began, now))
        waited = time.monotonic() - began
        self.running = self.box.requests.start(admitted, self._timeout, waited, self._since)
        self.request.scope["state"]["logged"] = True  # the request logs itself
        if not background:
            self._watcher = asyncio.create_task(self._cancel_on_disconnect())

    async def _cancel_on_disconnect(self) -> None:
        await disconnected(self.request.receive)
        self.running.cancel()

    def failed(self, error: ApiError) -> Failed:
        """Count an error that ends an answer that has begun; returns it as the client sees it."""
        error_responses.count(self.request, error)
        contact, path = self.box.config.server.contact, self.request.url.path
        return Failed(error_responses.adapted(error, contact, path))

    async def collect(self) -> AsyncIterator[RequestEvent]:
        """Yields all events up to Finished.  Raises the error of Failed."""
        try:
            while True:
                for event in await self.running.events.take():
                    self._release_body()
                    if isinstance(event, Failed):
                        raise event.error
                    self.note(event)
                    yield event
                    if isinstance(event, Finished):
                        return
        finally:
            self._watcher.cancel()

    async def answer(
        self,
        jobs: list[Job],
        builder: AnswerBuilder[T],
        *,
        stream: bool | None,
        stream_type: type[Stream] = EventStream,  # type: ignore[assignment]
        settle: Callable[[Finished], Awaitable[None]] | None = None,
    ) -> T | Stream:
        """Start the request and answer it, whole or as a stream; `settle` is awaited before the
        last event is taken.  Raises what `start` does, and the error of Failed, in a stream only
        before its first output."""
        await self.start(jobs)
        if not stream:
            async for event in self.collect():
                if settle is not None and isinstance(event, Finished):
                    await settle(event)
                builder.take(event)
            return builder.whole()
        first = asyncio.create_task(self._first())
        # A failure before the first token keeps its own status.  After the grace period a long wait
        # (the engine is loading, or the queue is long) is bridged with comments.
        await asyncio.wait({first}, timeout=self.box.config.server.stream_grace_seconds)
        if first.done() and isinstance(last := first.result()[-1], Failed):
            self._watcher.cancel()
            raise last.error
        return stream_type(self._chunks(first, builder.encode, settle), self._watcher)

    async def _first(self) -> list[RequestEvent]:
        """The events up to the first output or failure."""
        events = await self.running.events.take()
        while isinstance(events[-1], ChoiceStarted):
            events = [*events, *await self.running.events.take()]
        self._release_body()
        self.note(events[0])
        return events

    async def _chunks(
        self,
        first: asyncio.Task[list[RequestEvent]],
        encode: Callable[[RequestEvent], bytes],
        settle: Callable[[Finished], Awaitable[None]] | None,
    ) -> AsyncIterator[bytes]:
        """Yields what `encode` makes of the events, as many at a time as have arrived.

        Outputs that find everything before them written are written where they arrive, if the
        connection can do that."""
        events = await first
        writer, mailbox = chunk_writer(self.request.scope), self.running.events

        def write(event: RequestEvent) -> bool:
            if not isinstance(event, Output) or event.finish_reason is not None:
                return False
            if writer is None or not writer.ready:
                return False
            try:
                data = encode(event)
            except Exception:  # the generator's to meet, not the engine's
                return False
            writer.write(data)
            return True

        while True:
            if settle is not None and isinstance(end := events[-1], Finished):
                if data := b"".join(map(encode, events[:-1])):
                    yield data
                await settle(end)
                events = [end]
            if isinstance(last := events[-1], Failed):
                events[-1] = self.failed(last.error)
            if data := b"".join(map(encode, events)):
                yield data
            if isinstance(events[-1], Finished | Failed):
                return
            if writer is not None:
                mailbox.offer = write
            events = await mailbox.take()
            mailbox.offer = None

    def _release_body(self) -> None:
        """Release the memory of the body once it is not needed any more."""
        if not self._keeps_body:
            release_body(self.request)

    def note(self, event: RequestEvent) -> None:
        """Set the headers that depend on the first event of a choice."""
        if not isinstance(event, ChoiceStarted):
            return
        if event.route:
            self.request.scope["state"]["route"] = event.route
        if self.thinking_field and not event.thinks:
            self.ignored.append(self.thinking_field)
            self.thinking_field = ""


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


def keep_alive_seconds(value: float | str | None) -> float | None:
    """Seconds; a negative value stands for ever.  Raises InvalidBody."""
    try:
        if isinstance(value, str):  # Ollama's clients also write 1h30m
            value = sum(map(parse_duration, re.split("(?<=[a-z])(?=[0-9])", value)))
    except ValueError as error:
        raise InvalidBody(str(error), loc=("body", "keep_alive")) from None
    return math.inf if value is not None and value < 0 else value


def reader_of(job: Job, started: ChoiceStarted, custom_tools: Collection[str] = ()) -> Reader:
    """Reads the output of a choice; `custom_tools` are the names of its custom tools."""
    return Reader(
        STYLES[started.tool_style] if job.tools else None,
        job.tools.names if job.tools else (),
        custom_tools=custom_tools,
        thinks=started.thinks,
        thinking=started.thinking,
    )


async def disconnected(receive: Receive) -> None:
    """Returns once the client has disconnected."""
    while (await receive())["type"] != "http.disconnect":
        pass


def last_fields(end: Finished) -> dict[str, Any]:
    """The fields of a chat or completion that are known at its end."""
    usage = Usage(
        prompt_tokens=end.prompt_tokens,
        completion_tokens=end.completion_tokens,
        total_tokens=end.prompt_tokens + end.completion_tokens,
        prompt_tokens_details=PromptTokensDetails(end.cached_tokens),
    )
    shift = {"context_shift": ContextShift(end.shifted_tokens)} if end.shifted_tokens else {}
    return {"usage": usage, **shift}
