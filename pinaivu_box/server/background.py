"""Responses that run without their client: what they have said so far, for whoever asks.

Each has a task that takes the events of its request, encodes them for streams, and writes down what
has become of it.  Only when that is on disk is it told.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import zlib
from collections.abc import AsyncIterator

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive

from pinaivu_box.errors import InternalError, NoNodesAvailable
from pinaivu_box.gateway.mailbox import Mailbox
from pinaivu_box.gateway.requests import Failed, Finished
from pinaivu_box.gateway.requests import Request as Running
from pinaivu_box.openai.responses import ResponseObject
from pinaivu_box.server.inference import Call, disconnected
from pinaivu_box.server.response_answer import ResponseAnswer
from pinaivu_box.server.stream import EventStream
from pinaivu_box.store import responses as stored

log = logging.getLogger("pinaivu.background")

_CANCEL_SECONDS = 5.0  # that the answer to a cancellation waits for the end
_AGAIN_SECONDS = 5.0  # from one try to write to the next
_END_SECONDS = 10.0  # to write what has ended when the box stops
_Follower = Mailbox["bytes | None"]  # None: there is no more


class BackgroundResponse:
    """One that has not ended, or is not on disk yet."""

    def __init__(self, call: Call, running: Running, answer: ResponseAnswer) -> None:
        self.id = answer.response().id
        self.account_id = call.key.account_id
        self._call = call
        self._running = running
        self._answer = answer
        self._said = answer.queue()  # the place of an event is its number
        self._followers: set[_Follower] = set()
        self._cancelled = False
        self._ended: ResponseObject | None = None  # as it was before its end
        self.task: asyncio.Task[None]  # once it is started

    def shown(self) -> ResponseObject:
        """As it is now; encode it at once."""
        now = self._ended or self._answer.response()
        return msgspec.structs.replace(now, status="cancelled") if self._cancelled else now

    def follow(self, request: Request, after: int) -> Response:
        """A stream of its events, without those up to number `after`."""
        follower: _Follower = Mailbox()
        for event in self._said[after + 1 :]:
            follower.put(event)
        self._followers.add(follower)
        leaving = asyncio.create_task(_put_at_the_end(request.receive, follower))
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
            last = Failed(InternalError("The box failed on this request; its log says why."))
        await self._end(last)

    async def _take_all(self) -> Finished | Failed:
        """All that its request says; returns the last of it."""
        while True:
            events = await self._running.events.take()
            self._call.note(events[0])
            if isinstance(last := events[-1], Finished | Failed):
                self._say(self._answer.encode_each(events[:-1]))
                return last
            self._say(self._answer.encode_each(events))

    async def _end(self, last: Finished | Failed) -> None:
        self._ended = self._answer.response()
        stopped = isinstance(last, Failed) or last.finish_reason == "cancelled"
        if stopped and self._cancelled:
            said = self._answer.stop(last)
        elif isinstance(last, Failed):
            said = self._answer.encode_each([self._call.failed(last.error)])
        elif stopped:
            said = self._answer.stop(last, NoNodesAvailable(stored.STOPPED))
        else:
            said = self._answer.encode_each([last])
        row, answer = self._answer.row(), self._answer
        events = await asyncio.to_thread(zlib.compress, b"".join([*self._said, *said]))
        while True:
            try:
                await stored.finish(self._call.box.database, row, events, **answer.room)
                break
            except sqlite3.Error:
                log.exception("the end of %s could not be written: tried again", self.id)
                await asyncio.sleep(_AGAIN_SECONDS)
        self._say(said)

    def _say(self, events: list[bytes]) -> None:
        self._said += events
        for follower in self._followers:
            for event in events:
                follower.put(event)

    def close(self) -> None:
        """Nothing more will be said."""
        for follower in self._followers:
            follower.put(None)

    async def _followed(self, follower: _Follower) -> AsyncIterator[bytes]:
        try:
            while True:
                events = await follower.take()
                if data := b"".join(event for event in events if event is not None):
                    yield data
                if None in events:
                    return
        finally:
            self._followers.discard(follower)


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


def replayed(events: bytes, after: int) -> bytes:
    """The stream that `events` (zlib) was, without its events up to number `after`."""
    said = zlib.decompress(events).split(b"\n\n")[after + 1 : -1]
    return b"".join(event + b"\n\n" for event in said)


async def _put_at_the_end(receive: Receive, follower: _Follower) -> None:
    await disconnected(receive)
    follower.put(None)
