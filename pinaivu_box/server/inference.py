"""What all endpoints share that run a model: read the body, admit, start, listen, stream."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive

from pinaivu_box.box import Box
from pinaivu_box.errors import BodyTooLarge, InvalidJson, RequestTimeout
from pinaivu_box.gateway.backend import Job
from pinaivu_box.gateway.requests import Begun, Failed, Finished, RequestEvent
from pinaivu_box.gateway.requests import Request as Running
from pinaivu_box.models.catalog import Model
from pinaivu_box.openai.request import decode
from pinaivu_box.openai.types import PromptTokensDetails, Usage
from pinaivu_box.server.auth import key_of, require_account
from pinaivu_box.server.stream import EventStream

LENIENT = "x-pinaivu-lenient"
_BODY_SECONDS = 30.0  # of silence in the middle of a body

Body = TypeVar("Body", bound=msgspec.Struct)


class Call:
    """One call of the API that runs a model: who asks, and the request once it is started."""

    def __init__(self, request: Request) -> None:
        require_account(request)
        self.box: Box = request.app.state.box
        self.key_id = key_of(request).id
        self.request_id: str = request.scope["state"]["request_id"]
        self.created_at = int(time.time())
        self.ignored: list[str] = []
        self._request = request
        self._watcher: asyncio.Task[None]  # once it is started

    async def body(self, kind: type[Body]) -> Body:
        """The decoded body; `ignored` then names what the client agreed to have ignored."""
        data = await read_body(self._request, self.box.config.server.max_body_bytes)
        lenient = self._request.headers.get(LENIENT) == "1"
        body, self.ignored = decode(data, kind, lenient=lenient)
        return body

    def admit(self, model_id: str) -> Model:
        return self.box.admission.check(model_id, self.box.requests.in_flight)

    def start(self, jobs: list[Job]) -> Running:
        running = self.box.requests.start(jobs, self.key_id)
        self._request.scope["state"]["logged"] = True  # from here on the request logs itself
        self._watcher = asyncio.create_task(_cancel_on_disconnect(self._request.receive, running))
        return running

    async def collect(self, running: Running) -> AsyncIterator[RequestEvent]:
        """All events up to Finished; raises what failed."""
        try:
            while True:
                for event in await running.events.take():
                    if isinstance(event, Failed):
                        raise event.error
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
        return EventStream(_chunks(running, first, encode, settle), self._watcher)


async def _first(running: Running) -> list[RequestEvent]:
    """The events up to the first that shows whether it goes well."""
    events = await running.events.take()
    while isinstance(events[-1], Begun):
        events = [*events, *await running.events.take()]
    return events


async def _chunks(
    running: Running,
    first: asyncio.Task[list[RequestEvent]],
    encode: Callable[[Sequence[RequestEvent]], bytes],
    settle: Callable[[Finished], Awaitable[None]] | None,
) -> AsyncIterator[bytes]:
    events = await first
    while True:
        if settle is not None and isinstance(end := events[-1], Finished):
            if data := encode(events[:-1]):
                yield data
            await settle(end)
            events = [end]
        if data := encode(events):
            yield data
        if isinstance(events[-1], Finished | Failed):
            return
        events = await running.events.take()


async def _cancel_on_disconnect(receive: Receive, running: Running) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    running.cancel()


async def read_body(request: Request, limit: int) -> bytes:
    """The whole body; BodyTooLarge once it is over `limit` bytes."""
    announced = request.headers.get("content-length", "0")
    parts: list[bytes] = []
    size = int(announced) if announced.isdigit() else 0
    try:
        if size <= limit:
            size = 0
            stream = request.stream()
            while part := await asyncio.wait_for(anext(stream, b""), _BODY_SECONDS):
                size += len(part)
                if size > limit:
                    break
                parts.append(part)
    except TimeoutError:
        raise RequestTimeout(
            f"The rest of the body did not come within {_BODY_SECONDS:g} seconds: send it again."
        ) from None
    except ClientDisconnect:
        raise InvalidJson("The connection closed before the whole body had come.") from None
    if size > limit:
        raise BodyTooLarge(f"The body is larger than the {limit} bytes that this box accepts.")
    return b"".join(parts)


def usage_of(end: Finished) -> Usage:
    return Usage(
        prompt_tokens=end.prompt_tokens,
        completion_tokens=end.completion_tokens,
        total_tokens=end.prompt_tokens + end.completion_tokens,
        prompt_tokens_details=PromptTokensDetails(end.cached_tokens),
    )
