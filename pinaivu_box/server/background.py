"""Responses that run in the background, without a connected client.

Each has a task that takes the events of its request, encodes them for the clients that follow it,
and stores the result.  The last events are sent only once that is on disk.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable

import msgspec
from starlette.requests import Request

from pinaivu_box.errors import ApiError, BadRequest, InternalError, NoNodesAvailable, RateLimited
from pinaivu_box.gateway.request import Failed, Finished
from pinaivu_box.openai.responses import ResponseObject
from pinaivu_box.server.bodies import keep_body
from pinaivu_box.server.inference import InferenceCall, disconnected
from pinaivu_box.server.response_answer import ResponseAnswer
from pinaivu_box.server.sse import END_OF_EVENT, EventStream
from pinaivu_box.store import responses as stored
from pinaivu_box.tasks import TaskSet

log = logging.getLogger("pinaivu.background")

_CANCEL_SECONDS = 5.0  # how long the answer to a cancellation waits for the end
_RETRY_SECONDS = 5.0  # between two attempts to store a response
_SHUTDOWN_SECONDS = 10.0  # to store responses that have ended when the box stops
_MAX_EVENT_BYTES = 32_000_000  # of one response
_MAX_FOLLOWERS = 16  # streams of one response at a time
_SLICE_BYTES = 65536  # passed to a connection at a time
_FAILED = "The box failed on this request; its log says why."


class BackgroundResponse:
    """A response that has not ended, or is not on disk yet."""

    def __init__(self, call: InferenceCall, answer: ResponseAnswer) -> None:
        self.id = answer.whole().id
        self.account_id = call.key.account_id
        self._call, self._answer = call, answer
        self._events = bytearray()
        self._starts: list[int] = []  # of the events in `_events`, by sequence number
        self._followers = 0
        self._closed = False
        self._changed = asyncio.Event()  # wakes the followers
        self._stopped_by: ApiError | None = None
        self._cancelled = False
        self._before_end: ResponseObject | None = None  # set once its request has ended
        self.task: asyncio.Task[None]  # set when it is started
        self._append(answer.queue())

    def response(self) -> ResponseObject:
        """As it is so far.  Encode it before anything else runs."""
        response = self._before_end or self._answer.whole()
        if self._cancelled:
            response = msgspec.structs.replace(response, status="cancelled")
        return response

    def follow(self, request: Request, after: int) -> EventStream:
        """A stream of its events after number `after`.  Raises RateLimited."""
        if self._followers >= _MAX_FOLLOWERS:
            raise RateLimited(
                f"{_MAX_FOLLOWERS} streams of the response '{self.id}' are open, which is the "
                "limit: close one, or get the response without stream."
            )
        self._followers += 1
        watcher = asyncio.create_task(disconnected(request.receive))
        watcher.add_done_callback(lambda _: self._wake())
        return EventStream(self._stream(after + 1, watcher), watcher)

    async def cancel(self) -> bool:
        """Stop it; returns whether it has ended within some seconds."""
        if self._before_end is None:
            self._cancelled = True
            self._call.running.cancel()
        await asyncio.wait({self.task}, timeout=_CANCEL_SECONDS)
        return self.task.done()

    async def run(self) -> None:
        """Returns once its end is on disk."""
        try:
            last = await self._take_events()
        except Exception:
            log.exception("%s failed", self.id)
            self._call.running.cancel()
            last = Failed(InternalError(_FAILED))
        try:
            await self._end(last)
        except Exception:
            # Its answer cannot be stored as it is; that it has failed can.
            log.exception("the answer of %s cannot be stored", self.id)
            await self._store(lambda: stored.fail(self._call.box.database, self.id, _FAILED))

    async def _take_events(self) -> Finished | Failed:
        """Append all events of the request but the last; returns that."""
        while True:
            events = await self._call.running.events.take()
            self._call.note(events[0])
            if isinstance(last := events[-1], Finished | Failed):
                self._append(self._answer.encode_each(events[:-1]))
                return last
            self._append(self._answer.encode_each(events))
            if len(self._events) > _MAX_EVENT_BYTES and self._stopped_by is None:
                self._stopped_by = BadRequest(
                    f"The response has more than {_MAX_EVENT_BYTES // 1_000_000} MB of events, the "
                    "limit in the background: lower max_output_tokens, or stream it."
                )
                self._call.running.cancel()

    async def _end(self, last: Finished | Failed) -> None:
        self._before_end = self._answer.whole()
        stopped = isinstance(last, Failed) or last.finish_reason == "cancelled"
        if stopped and self._cancelled:
            events = self._answer.stop(last)
        elif isinstance(last, Failed):
            events = self._answer.encode_each([self._call.failed(last.error)])
        elif stopped:
            events = self._answer.stop(last, self._stopped_by or NoNodesAvailable(stored.STOPPED))
        else:
            events = self._answer.encode_each([last])
        row, limits = self._answer.row(), self._answer.storage_limits
        compressed = await asyncio.to_thread(_compress, [self._events, *events])
        await self._store(lambda: stored.finish(self._call.box.database, row, compressed, **limits))
        self._append(events)

    async def _store(self, write: Callable[[], Awaitable[None]]) -> None:
        """Returns once it is on disk; retries while the disk is full."""
        while True:
            try:
                await write()
                return
            except sqlite3.OperationalError:
                log.exception("the end of %s could not be stored: retrying", self.id)
                await asyncio.sleep(_RETRY_SECONDS)

    def _append(self, events: list[bytes]) -> None:
        for event in events:
            self._starts.append(len(self._events))
            self._events += event
        self._wake()

    def close(self) -> None:
        """No more events will come."""
        self._closed = True
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed.clear()

    async def _stream(self, number: int, watcher: asyncio.Task[None]) -> AsyncIterator[bytes]:
        """Yields the events from that number on, at most a slice at a time: for slow or many
        clients all events are never copied at once."""
        position: int | None = None
        try:
            while not watcher.done():
                if position is None and number < len(self._starts):
                    position = self._starts[number]
                if position is not None and position < len(self._events):
                    data = bytes(self._events[position : position + _SLICE_BYTES])
                    position += len(data)
                    yield data
                elif self._closed:
                    return
                else:
                    await self._changed.wait()
        finally:
            self._followers -= 1


class Background:
    """The background responses of this box."""

    def __init__(self) -> None:
        self._running: dict[str, BackgroundResponse] = {}
        self._tasks = TaskSet()

    async def start(self, call: InferenceCall, answer: ResponseAnswer) -> BackgroundResponse:
        """Take over a call that has been started.  Returns once the row of its response is on
        disk."""
        # The memory of its body stays reserved until it has ended, not until it is answered.
        release_body = keep_body(call.request)
        try:
            response = BackgroundResponse(call, answer)
            await answer.insert()
        except BaseException:
            call.running.cancel()
            release_body()
            raise
        self._running[response.id] = response
        response.task = self._tasks.spawn(self._run(response, release_body))
        return response

    def find(self, response_id: str, account_id: str) -> BackgroundResponse | None:
        """A running response of that account; all others have ended and are on disk, or never
        existed."""
        response = self._running.get(response_id)
        return response if response is not None and response.account_id == account_id else None

    def forget(self, response: BackgroundResponse) -> None:
        """No longer find a response, because it was deleted or has ended."""
        self._running.pop(response.id, None)

    async def shut_down(self) -> None:
        """Wait for responses whose requests have ended; the next start marks the rest as failed."""
        await self._tasks.finish(_SHUTDOWN_SECONDS)

    async def _run(self, response: BackgroundResponse, release_body: Callable[[], None]) -> None:
        try:
            await response.run()
        finally:
            self.forget(response)
            response.close()
            release_body()


async def replayed(events: bytes, after: int) -> AsyncIterator[bytes]:
    """Yields the events after number `after` of a stream that is compressed (zlib)."""
    inflate = zlib.decompressobj()
    skip, head = after + 1, b""
    while data := inflate.decompress(events, _SLICE_BYTES):
        events = inflate.unconsumed_tail
        data, position = head + data, 0
        while skip and (end := data.find(END_OF_EVENT, position)) >= 0:
            position, skip = end + len(END_OF_EVENT), skip - 1
        if skip:
            head = data[max(position, len(data) - 1) :]  # may be half of an END_OF_EVENT
            continue
        head = b""
        if position < len(data):
            yield data[position:]


def _compress(events: list[bytes | bytearray]) -> bytes:
    deflate = zlib.compressobj()
    return b"".join([*map(deflate.compress, events), deflate.flush()])
