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
from starlette.types import Receive

from pinaivu_box.errors import ApiError, BadRequest, InternalError, NoNodesAvailable, RateLimited
from pinaivu_box.gateway.request import Failed, Finished
from pinaivu_box.gateway.request import Request as Running
from pinaivu_box.openai.responses import ResponseObject
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


class _Follower:
    """A client that reads `events`, from number `position` on."""

    def __init__(self, events: list[bytes], position: int) -> None:
        self.disconnected = False
        self.wake = asyncio.Event()
        self._events = events
        self._position = position
        self._offset = 0  # bytes of that event which were sent

    def take(self) -> bytes:
        """The next bytes, at most a slice: for slow or many clients all events are never copied at
        once."""
        parts, size = [], 0
        while self._position < len(self._events) and size < _SLICE_BYTES:
            event = self._events[self._position]
            part = event[self._offset : self._offset + _SLICE_BYTES - size]
            parts.append(part)
            size += len(part)
            self._offset += len(part)
            if self._offset == len(event):
                self._position, self._offset = self._position + 1, 0
        return b"".join(parts)


class BackgroundResponse:
    """A response that has not ended, or is not on disk yet.  Once it is, `release_body` is called
    to release the memory of its body."""

    def __init__(
        self,
        call: InferenceCall,
        running: Running,
        answer: ResponseAnswer,
        release_body: Callable[[], None],
    ) -> None:
        self.id = answer.response().id
        self.account_id = call.key.account_id
        self.release_body = release_body
        self._call = call
        self._running = running
        self._answer = answer
        self._events: list[bytes] = []  # by sequence number
        self._size = 0
        self._followers: set[_Follower] = set()
        self._closed = False
        self._stopped_by: ApiError | None = None
        self._cancelled = False
        self._before_end: ResponseObject | None = None  # set once its request has ended
        self.task: asyncio.Task[None]  # set when it is started
        self._append(answer.queue())

    def response(self) -> ResponseObject:
        """As it is so far.  Encode it before anything else runs."""
        response = self._before_end or self._answer.response()
        if self._cancelled:
            response = msgspec.structs.replace(response, status="cancelled")
        return response

    def follow(self, request: Request, after: int) -> EventStream:
        """A stream of its events after number `after`.  Raises RateLimited."""
        if len(self._followers) >= _MAX_FOLLOWERS:
            raise RateLimited(
                f"{_MAX_FOLLOWERS} streams of the response '{self.id}' are open, which is the "
                "limit: close one, or get the response without stream."
            )
        follower = _Follower(self._events, after + 1)
        self._followers.add(follower)
        watcher = asyncio.create_task(self._watch(request.receive, follower))
        return EventStream(self._stream(follower), watcher)

    async def cancel(self) -> bool:
        """Stop it; returns whether it has ended within some seconds."""
        if self._before_end is None:
            self._cancelled = True
            self._running.cancel()
        await asyncio.wait({self.task}, timeout=_CANCEL_SECONDS)
        return self.task.done()

    async def run(self) -> None:
        """Returns once its end is on disk."""
        try:
            last = await self._take_events()
        except Exception:
            log.exception("%s failed", self.id)
            self._running.cancel()
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
            events = await self._running.events.take()
            self._call.note(events[0])
            if isinstance(last := events[-1], Finished | Failed):
                self._append(self._answer.encode_each(events[:-1]))
                return last
            self._append(self._answer.encode_each(events))
            if self._size > _MAX_EVENT_BYTES and self._stopped_by is None:
                self._stopped_by = BadRequest(
                    f"The response has more than {_MAX_EVENT_BYTES // 1_000_000} MB of events, the "
                    "limit in the background: lower max_output_tokens, or stream it."
                )
                self._running.cancel()

    async def _end(self, last: Finished | Failed) -> None:
        self._before_end = self._answer.response()
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
        compressed = await asyncio.to_thread(_compress, [*self._events, *events])
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
        self._events += events
        self._size += sum(map(len, events))
        self._wake()

    def close(self) -> None:
        """No more events will come."""
        self._closed = True
        self._wake()

    def _wake(self) -> None:
        for follower in self._followers:
            follower.wake.set()

    async def _stream(self, follower: _Follower) -> AsyncIterator[bytes]:
        try:
            while not follower.disconnected:
                follower.wake.clear()
                if data := follower.take():
                    yield data
                elif self._closed:
                    return
                else:
                    await follower.wake.wait()
        finally:
            self._followers.discard(follower)

    async def _watch(self, receive: Receive, follower: _Follower) -> None:
        await disconnected(receive)
        follower.disconnected = True
        follower.wake.set()


class Background:
    """The background responses of this box."""

    def __init__(self) -> None:
        self._running: dict[str, BackgroundResponse] = {}
        self._tasks = TaskSet()

    def start(self, response: BackgroundResponse) -> None:
        """Start a response whose row is on disk."""
        self._running[response.id] = response
        response.task = self._tasks.spawn(self._run(response))

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
        if not self._tasks:
            return
        _, left = await asyncio.wait(self._tasks, timeout=_SHUTDOWN_SECONDS)
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)

    async def _run(self, response: BackgroundResponse) -> None:
        try:
            await response.run()
        finally:
            self.forget(response)
            response.close()
            response.release_body()


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


def _compress(events: list[bytes]) -> bytes:
    deflate = zlib.compressobj()
    return b"".join([*map(deflate.compress, events), deflate.flush()])
