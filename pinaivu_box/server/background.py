"""Responses that run without their client: what they have said so far, for whoever asks.

Each has a task that takes the events of its request, encodes them for streams, and writes down what
has become of it.  Only when that is on disk is it told.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive

from pinaivu_box.errors import ApiError, BadRequest, InternalError, NoNodesAvailable, RateLimited
from pinaivu_box.gateway.request import Failed, Finished
from pinaivu_box.gateway.request import Request as Running
from pinaivu_box.openai.responses import ResponseObject
from pinaivu_box.server.inference import InferenceCall, disconnected
from pinaivu_box.server.response_answer import ResponseAnswer
from pinaivu_box.server.stream import EventStream
from pinaivu_box.store import responses as stored

log = logging.getLogger("pinaivu.background")

_CANCEL_SECONDS = 5.0  # that the answer to a cancellation waits for the end
_AGAIN_SECONDS = 5.0  # from one try to write to the next
_END_SECONDS = 10.0  # to write what has ended when the box stops
_MOST_BYTES = 32_000_000  # of events of one response
_MOST_FOLLOWERS = 16  # streams of one response at a time
_SLICE = 65536  # bytes that are handed to a connection at a time


_END_OF_EVENT = b"\n\n"
_FAILED = "The box failed on this request; its log says why."


class _Follower:
    """A client that reads the events of `said`, from number `at` on."""

    def __init__(self, said: list[bytes], at: int) -> None:
        self.left = False
        self.wake = asyncio.Event()
        self._said = said
        self._at = at
        self._offset = 0  # bytes of that event which it has got

    def take(self) -> bytes:
        """What comes next, a slice at most: a client may be slow, or many, so what has been said is
        never copied for it as a whole."""
        parts, size = [], 0
        while self._at < len(self._said) and size < _SLICE:
            event = self._said[self._at]
            part = event[self._offset : self._offset + _SLICE - size]
            parts.append(part)
            size += len(part)
            self._offset += len(part)
            if self._offset == len(event):
                self._at, self._offset = self._at + 1, 0
        return b"".join(parts)


class BackgroundResponse:
    """One that has not ended, or is not on disk yet.  `leave` is called once it is: it gives back
    the room that its body takes."""

    def __init__(
        self,
        call: InferenceCall,
        running: Running,
        answer: ResponseAnswer,
        leave: Callable[[], None],
    ) -> None:
        self.id = answer.response().id
        self.account_id = call.key.account_id
        self.leave = leave
        self._call = call
        self._running = running
        self._answer = answer
        self._said: list[bytes] = []  # the place of an event is its number
        self._size = 0
        self._followers: set[_Follower] = set()
        self._closed = False
        self._stopped_by: ApiError | None = None
        self._cancelled = False
        self._ended: ResponseObject | None = None  # as it was before its end
        self.task: asyncio.Task[None]  # once it is started
        self._say(answer.queue())

    def shown(self) -> ResponseObject:
        """As it is now; encode it at once."""
        now = self._ended or self._answer.response()
        return msgspec.structs.replace(now, status="cancelled") if self._cancelled else now

    def follow(self, request: Request, after: int) -> Response:
        """A stream of its events, without those up to number `after`.  Raises RateLimited."""
        if len(self._followers) >= _MOST_FOLLOWERS:
            raise RateLimited(
                f"{_MOST_FOLLOWERS} streams of the response '{self.id}' are open, which is all "
                "that are served at a time: close one, or get it without stream."
            )
        follower = _Follower(self._said, after + 1)
        self._followers.add(follower)
        leaving = asyncio.create_task(self._until_left(request.receive, follower))
        return EventStream(self._followed(follower), leaving)

    async def cancel(self) -> bool:
        """Stop it; whether it has ended."""
        if self._ended is None:
            self._cancelled = True
            self._running.cancel()
        await asyncio.wait({self.task}, timeout=_CANCEL_SECONDS)
        return self.task.done()

    async def run(self) -> None:
        """Until its end is on disk."""
        try:
            last = await self._take_all()
        except Exception:
            log.exception("%s failed", self.id)
            self._running.cancel()
            last = Failed(InternalError(_FAILED))
        try:
            await self._end(last)
        except Exception:
            # Its answer cannot be written as it is: all that is known is that it has ended.
            log.exception("the answer of %s cannot be written", self.id)
            await self._written(lambda: stored.fail(self._call.box.database, self.id, _FAILED))

    async def _take_all(self) -> Finished | Failed:
        """All that its request says; returns the last of it."""
        while True:
            events = await self._running.events.take()
            self._call.note(events[0])
            if isinstance(last := events[-1], Finished | Failed):
                self._say(self._answer.encode_each(events[:-1]))
                return last
            self._say(self._answer.encode_each(events))
            if self._size > _MOST_BYTES and self._stopped_by is None:
                self._stopped_by = BadRequest(
                    f"The response has over {_MOST_BYTES // 1_000_000} MB of events, which is all "
                    "that is kept of one in the background: lower max_output_tokens, or stream it."
                )
                self._running.cancel()

    async def _end(self, last: Finished | Failed) -> None:
        self._ended = self._answer.response()
        stopped = isinstance(last, Failed) or last.finish_reason == "cancelled"
        if stopped and self._cancelled:
            said = self._answer.stop(last)
        elif isinstance(last, Failed):
            said = self._answer.encode_each([self._call.failed(last.error)])
        elif stopped:
            said = self._answer.stop(last, self._stopped_by or NoNodesAvailable(stored.STOPPED))
        else:
            said = self._answer.encode_each([last])
        row, room = self._answer.row(), self._answer.room
        events = await asyncio.to_thread(_compressed, [*self._said, *said])
        await self._written(lambda: stored.finish(self._call.box.database, row, events, **room))
        self._say(said)

    async def _written(self, write: Callable[[], Awaitable[None]]) -> None:
        """Returns once it is on disk: a full one is tried again."""
        while True:
            try:
                await write()
                return
            except sqlite3.OperationalError:
                log.exception("the end of %s could not be written: tried again", self.id)
                await asyncio.sleep(_AGAIN_SECONDS)

    def _say(self, events: list[bytes]) -> None:
        self._said += events
        self._size += sum(map(len, events))
        self._wake()

    def close(self) -> None:
        """Nothing more will be said."""
        self._closed = True
        self._wake()

    def _wake(self) -> None:
        for follower in self._followers:
            follower.wake.set()

    async def _followed(self, follower: _Follower) -> AsyncIterator[bytes]:
        try:
            while not follower.left:
                follower.wake.clear()
                if data := follower.take():
                    yield data
                elif self._closed:
                    return
                else:
                    await follower.wake.wait()
        finally:
            self._followers.discard(follower)

    async def _until_left(self, receive: Receive, follower: _Follower) -> None:
        await disconnected(receive)
        follower.left = True
        follower.wake.set()


class Background:
    """Those of this box."""

    def __init__(self) -> None:
        self._running: dict[str, BackgroundResponse] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, response: BackgroundResponse) -> None:
        """Its row is on disk."""
        self._running[response.id] = response
        response.task = asyncio.create_task(self._run(response))
        self._tasks.add(response.task)
        response.task.add_done_callback(self._tasks.discard)

    def find(self, response_id: str, account_id: str) -> BackgroundResponse | None:
        """One of that account.  What is not here has ended and is on disk, or never was."""
        found = self._running.get(response_id)
        return found if found is not None and found.account_id == account_id else None

    def forget(self, response: BackgroundResponse) -> None:
        """It was deleted."""
        self._running.pop(response.id, None)

    async def ended(self) -> None:
        """Wait for those whose requests have ended; the next start says that the rest failed."""
        if not self._tasks:
            return
        _, left = await asyncio.wait(self._tasks, timeout=_END_SECONDS)
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)

    async def _run(self, response: BackgroundResponse) -> None:
        try:
            await response.run()
        finally:
            self.forget(response)
            response.close()
            response.leave()


async def replayed(events: bytes, after: int) -> AsyncIterator[bytes]:
    """The stream that `events` (zlib) was, without its events up to number `after`."""
    inflate = zlib.decompressobj()
    skip, head = after + 1, b""
    while data := inflate.decompress(events, _SLICE):
        events = inflate.unconsumed_tail
        data, at = head + data, 0
        while skip and (end := data.find(_END_OF_EVENT, at)) >= 0:
            at, skip = end + len(_END_OF_EVENT), skip - 1
        if skip:
            head = data[max(at, len(data) - 1) :]  # it may begin the end of an event
            continue
        head = b""
        if at < len(data):
            yield data[at:]


def _compressed(events: list[bytes]) -> bytes:
    deflate = zlib.compressobj()
    return b"".join([*map(deflate.compress, events), deflate.flush()])
