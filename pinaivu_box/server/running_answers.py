"""Answers in conversations while they are made: each goes on when its browser leaves.

An answer has a task that takes the events of its request.  What there is of it is sealed and stored
every few seconds, so that of a box that dies in the middle that part is left.  Its end is told only
once it is on disk.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sqlite3
import time
from collections.abc import AsyncIterator, Callable, Iterator

import msgspec
from starlette.requests import Request

from pinaivu_box.chats.conversations import Chats
from pinaivu_box.chats.growing_text import GrowingText
from pinaivu_box.engine.messages import Output
from pinaivu_box.errors import BoxError, InternalError, RateLimited
from pinaivu_box.gateway.backend import Job
from pinaivu_box.gateway.request import ChoiceStarted, Failed, Finished, RequestEvent
from pinaivu_box.openai import conversations as wire
from pinaivu_box.openai.conversations import AnswerDelta, AnswerStarted, Conversation, Message
from pinaivu_box.openai.reader import Reader, Reasoning, Text
from pinaivu_box.server.bodies import keep_body
from pinaivu_box.server.inference import InferenceCall, disconnected, reader_of
from pinaivu_box.server.sse import EventStream, encode_event
from pinaivu_box.tasks import TaskSet

log = logging.getLogger("pinaivu.answers")

_SAVE_SECONDS = 3.0
_RETRY_SECONDS = 5.0  # between two attempts to store an end
_SHUTDOWN_SECONDS = 10.0
_STOP_SECONDS = 5.0  # how long the answer to a stop waits for the end
_KEPT_SECONDS = 10.0  # an answer is found after its end
_MAX_FOLLOWERS = 16  # streams of one answer at a time


class RunningAnswer:
    """An answer that has not ended, or has just ended.

    `message` is how it will be stored: with the text so far once that was saved, and as a whole at
    the end.
    """

    def __init__(
        self,
        call: InferenceCall,
        job: Job,
        chats: Chats,
        conversation: Conversation,
        message: Message,
        on_end: Callable[[RunningAnswer], None],
    ) -> None:
        self.account_id = call.key.account_id
        self.conversation = conversation
        self.message = message
        self.task: asyncio.Task[None]  # set when it is started
        self._call, self._job, self._chats, self._on_end = call, job, chats, on_end
        self._reader = Reader(None)  # until it is started
        self._thoughts, self._text = GrowingText(), GrowingText()
        self._first = self._last = 0.0  # monotonic: of the first output and the last
        self._stopped = self._too_long = self._ended = False
        self._followers = 0
        self._changed = asyncio.Event()

    def so_far(self) -> Message:
        """The message with all that there is of it."""
        if self._ended:
            return self.message
        return msgspec.structs.replace(
            self.message, content=str(self._text), reasoning=str(self._thoughts)
        )

    async def stop(self) -> bool:
        """Returns once it has ended, or after some seconds; False if it had ended before."""
        if self._ended:
            return False
        self._stopped = True
        self._call.running.cancel()
        await asyncio.wait({self.task}, timeout=_STOP_SECONDS)
        return True

    async def deltas(
        self, watcher: asyncio.Task[None], offset: str = "0.0"
    ) -> AsyncIterator[AnswerDelta]:
        """What there is after that offset (see `AnswerDelta`), and what comes, until its end or
        that of `watcher`, by which it has to be `followed`."""
        thoughts, text = map(int, offset.split("."))
        while not watcher.done():
            ended = self._ended
            reasoning, added = self._thoughts.since(thoughts), self._text.since(text)
            if reasoning or added:
                thoughts, text = thoughts + len(reasoning), text + len(added)
                yield AnswerDelta(f"{thoughts}.{text}", added, reasoning)
            elif ended:
                return
            else:
                await self._changed.wait()

    def check_followers(self) -> None:
        """Raises RateLimited if it has as many streams as it may have."""
        if self._followers >= _MAX_FOLLOWERS:
            raise RateLimited(
                f"{_MAX_FOLLOWERS} streams of this answer are open, which is the limit: close one."
            )

    @contextlib.contextmanager
    def followed(self, watcher: asyncio.Task[None]) -> Iterator[None]:
        """Counts a stream of it, whose `deltas` end when `watcher` does."""
        self._followers += 1
        watcher.add_done_callback(lambda _: self._wake())
        try:
            yield
        finally:
            self._followers -= 1

    def follow(self, request: Request, started: AnswerStarted, offset: str = "0.0") -> EventStream:
        """The stream of its events.  Raises RateLimited."""
        self.check_followers()
        watcher = asyncio.create_task(disconnected(request.receive))
        return EventStream(self._events(started, offset, watcher), watcher)

    async def _events(
        self, started: AnswerStarted, offset: str, watcher: asyncio.Task[None]
    ) -> AsyncIterator[bytes]:
        with self.followed(watcher):
            yield encode_event(started)
            async for delta in self.deltas(watcher, offset):
                yield encode_event(delta)
            if watcher.done():
                return
            yield encode_event(wire.AnswerFinished(self.message, self.conversation.title))

    async def run(self) -> None:
        """Returns once its end is on disk."""
        saving = asyncio.create_task(self._save_regularly())
        try:
            last = await self._take_events()
        except Exception:
            log.exception("the answer %s failed", self.message.id)
            self._call.running.cancel()
            last = Failed(InternalError("The box failed on this answer; its log says why."))
        finally:
            saving.cancel()
            await asyncio.gather(saving, return_exceptions=True)
        message = self._ended_with(last)
        try:
            await self._store(message)
        except Exception:
            log.exception("the end of %s cannot be stored", message.id)
            why = "The box could not store this answer; its log says why."
            message = msgspec.structs.replace(message, status="failed", error=why)
        with contextlib.suppress(BoxError, sqlite3.Error):  # it may have another title by now
            self.conversation = await self._chats.get(self.conversation.id)
        self.message, self._ended = message, True
        self._wake()
        self._on_end(self)

    async def _take_events(self) -> Finished | Failed:
        events = self._call.running.events
        events.offer = self._take_at_once
        while True:
            for event in await events.take():
                match event:
                    case ChoiceStarted():
                        self._call.note(event)
                        self._reader = reader_of(self._job, event)
                    case Output():
                        self._add(event)
                    case Finished() | Failed():
                        return event
            self._wake()

    def _take_at_once(self, event: RequestEvent) -> bool:
        """Take an output where it arrives, without this answer's task."""
        if isinstance(event, Output):
            self._add(event)
            self._wake()
            return True
        return False

    def _add(self, output: Output) -> None:
        self._last = time.monotonic()
        self._first = self._first or self._last
        for piece in self._reader.read(output):
            match piece:
                case Text(text):
                    self._add_to(self._text, text)
                case Reasoning(text):
                    self._add_to(self._thoughts, text)

    def _add_to(self, part: GrowingText, piece: str) -> None:
        room = wire.MAX_TEXT - len(self._text) - len(self._thoughts)
        part.add(piece[:room])
        if len(piece) > room and not self._too_long:
            self._too_long = True
            self._call.running.cancel()

    def _ended_with(self, last: Finished | Failed) -> Message:
        message = self.so_far()
        if isinstance(last, Failed):
            error = self._call.failed(last.error).error
            status = "stopped" if self._stopped else "failed"
            reason = "" if self._stopped else error.message
            return msgspec.structs.replace(message, status=status, error=reason)
        status = "complete"
        if last.finish_reason == "cancelled":
            status = "stopped" if self._stopped or self._too_long else "interrupted"
        seconds = self._last - self._first
        return msgspec.structs.replace(
            message,
            status=status,
            error="It was stopped, for it is longer than can be stored." if self._too_long else "",
            finish_reason=last.finish_reason,
            prompt_tokens=last.prompt_tokens,
            completion_tokens=last.completion_tokens,
            tokens_per_second=_rate(last.completion_tokens - 1, seconds),
        )

    async def _save_regularly(self) -> None:
        saved = 0
        while True:
            await asyncio.sleep(_SAVE_SECONDS)
            if (size := len(self._text) + len(self._thoughts)) == saved:
                continue
            with contextlib.suppress(sqlite3.Error):  # the end is stored in any case
                statement = self._chats.replacement(self.so_far(), self.conversation.id)
                await self._call.box.database.write(statement)
                saved = size

    async def _store(self, message: Message) -> None:
        """Returns once it is on disk; retries while the disk is full."""
        statement = self._chats.replacement(message, self.conversation.id)
        while True:
            try:
                await self._call.box.database.write(statement)
                return
            except sqlite3.OperationalError:
                log.exception("the end of %s could not be stored: retrying", message.id)
                await asyncio.sleep(_RETRY_SECONDS)

    def _wake(self) -> None:
        self._changed.set()
        self._changed.clear()


def _rate(tokens: int, seconds: float) -> float | None:
    return round(tokens / seconds, 1) if tokens > 0 and seconds > 0 else None


class RunningAnswers:
    """Those of this box."""

    def __init__(self) -> None:
        self._running: dict[str, RunningAnswer] = {}
        self._tasks = TaskSet()

    def start(self, call: InferenceCall, answer: RunningAnswer) -> None:
        """Take over a call that has been started."""
        # The memory of its body stays reserved until it has ended, not until it is answered.
        release_body = keep_body(call.request)
        self._running[answer.message.id] = answer
        answer.task = self._tasks.spawn(self._run(answer, release_body))

    async def _run(self, answer: RunningAnswer, release_body: Callable[[], None]) -> None:
        try:
            await answer.run()
        finally:
            release_body()
            # Whoever has just read its row, as it was before the end, still finds the end here.
            loop = asyncio.get_running_loop()
            loop.call_later(_KEPT_SECONDS, self._running.pop, answer.message.id, None)

    def find(self, account_id: str, message_id: str) -> RunningAnswer | None:
        answer = self._running.get(message_id)
        return answer if answer is not None and answer.account_id == account_id else None

    def of_account(self, account_id: str) -> list[RunningAnswer]:
        return [one for one in self._running.values() if one.account_id == account_id]

    def shown(self, account_id: str, message: Message) -> Message:
        """A stored message as it is now: one that nothing writes any more was interrupted."""
        if message.status != "running":
            return message
        if (running := self.find(account_id, message.id)) is not None:
            return running.so_far()
        return msgspec.structs.replace(message, status="interrupted")

    async def shut_down(self) -> None:
        """Wait until the ends of answers that were stopped are on disk."""
        await self._tasks.finish(_SHUTDOWN_SECONDS)
