"""A link to a peer and the streams over it, made of a plain encrypted connection: Hello, framing,
heartbeats."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar
from weakref import WeakSet

import msgspec
from msgspec import Struct, msgpack

from pinaivu_box import __version__
from pinaivu_box.errors import LinkLost, PeeringError, PeerRefused, ProtocolError
from pinaivu_box.tasks import TaskSet, ignore_exception
from pinaivu_box.transport import wire
from pinaivu_box.transport.wire import Code, Hello, Open, Refusal

DRAIN_SECONDS = 5.0  # for the end of a stream that nobody reads any more

T = TypeVar("T")
_refusals = msgpack.Decoder(Refusal)


class LinkView(Struct, frozen=True):
    """How a peer is reached.  `direct`: not by a relay.  `rtt_ms`: the latest round-trip time, in
    whole milliseconds, null if there is none."""

    direct: bool
    address: str
    rtt_ms: float | None


class Pipe(Protocol):
    """One stream of bytes, both ways.  All methods raise LinkLost."""

    async def read(self) -> bytes:
        """Return what has come, not much over 100 kB; b"" once the peer has finished."""

    async def write(self, data: bytes) -> None:
        """Wait until all of it is in the send window."""

    async def finish(self) -> None: ...

    def reset(self) -> None:
        """Stop both directions at once."""


class Connection(Protocol):
    """Pipes and heartbeats to a peer that has proven its key.  All methods that wait raise
    LinkLost."""

    peer: str

    async def open(self) -> Pipe: ...

    async def accept(self) -> Pipe: ...

    def send_heartbeat(self) -> None:
        """Send a heartbeat, which may get lost."""

    async def receive_heartbeat(self) -> None:
        """Wait for the peer's next heartbeat."""

    def received_bytes(self) -> int:
        """Return how many bytes of any kind have come so far; it only grows."""

    def close(self, why: LinkLost) -> None:
        """Close at once: the peer gets `why.code` and `why.reason`, our own side raises `why`."""

    async def closed(self) -> LinkLost:
        """Wait for the end, which after `close` has come."""

    def route(self) -> LinkView: ...


@dataclass(frozen=True)
class LinkOptions:
    """`versions` of the protocol that this box supports, and its wall `clock`, in Unix seconds.

    A heartbeat is sent each `beat_seconds`.  The link is lost after `max_silent` beats of ours in
    which nothing at all came, and after `max_stuck` in which the peer's machine answered, but its
    program sent nothing.  Beats are counted, not seconds: a process that was stopped itself gives
    its peers time.
    """

    versions: tuple[int, ...] = wire.VERSIONS
    clock: Callable[[], float] = time.time
    beat_seconds: float = 1.0
    max_silent: int = 4
    max_stuck: int = 30


class SharedCall(Generic[T]):
    """A call that goes on when its caller is cancelled: the next caller gets its result.

    Cancelled itself, a call to iroh can lose what it was about to return.
    """

    def __init__(self, call: Callable[[], Awaitable[T]]) -> None:
        self._call = call
        self._task: asyncio.Future[T] | None = None

    async def __call__(self) -> T:
        if self._task is None:
            self._task = asyncio.ensure_future(self._call())
            self._task.add_done_callback(ignore_exception)
        result = await asyncio.shield(self._task)
        self._task = None
        return result

    def cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()


class Stream:
    """Frames both ways, in order: one conversation.

    It must be ended: by `finish` on both sides and reading to the end, which is what `leave` does,
    or by `abandon`.  One task may send while another receives.  A receive that is cancelled loses
    nothing; a send that is cancelled abandons the stream, since a part of its frame may have gone
    out.
    """

    def __init__(
        self,
        link: Link,
        pipe: Pipe,
        opening: Open | None = None,
        max_bytes: int = wire.MAX_FRAME_BYTES,
    ) -> None:
        """`opening` is sent together with the first frames; then the first response may be a
        `Refusal`.  The peer's frames have at most `max_bytes`."""
        self.link = link
        self._pipe = pipe
        self._max_bytes = max_bytes
        self._unsent = b"" if opening is None else wire.frame(wire.encode(opening))
        self._may_be_refused = opening is not None
        self._read = SharedCall(pipe.read)
        self._buffer = bytearray()
        self._sending = asyncio.Lock()
        self._end_sent = self._end_received = False
        self._error: LinkLost | ProtocolError | None = None

    async def send(self, *frames: bytes) -> None:
        """Wait until the frames are on their way.  Raises LinkLost; ValueError if one is empty or
        over `wire.MAX_FRAME_BYTES`."""
        for frame in frames:
            if not 0 < len(frame) <= wire.MAX_FRAME_BYTES:
                raise ValueError(f"a frame has 1 to {wire.MAX_FRAME_BYTES} bytes, not {len(frame)}")
        await self._write(b"".join(map(wire.frame, frames)))

    async def finish(self) -> None:
        """Send no more; the peer may go on.  Raises LinkLost."""
        if not self._end_sent:
            await self._write(wire.END_FRAME)
            self._end_sent = True
            await self._pipe.finish()

    async def _write(self, data: bytes) -> None:
        async with self._sending:
            if self._error:
                raise self._error
            if self._end_sent:
                raise ValueError("nothing is sent after the end")
            opening, self._unsent = self._unsent, b""
            try:
                await self._pipe.write(opening + data)
            except LinkLost as lost:
                self._fail(lost)
                raise
            except asyncio.CancelledError:
                self.abandon()
                raise

    async def receive(self) -> bytes | None:
        """Wait for the next frame; returns None once the peer has finished.  Raises LinkLost if
        nothing more will come, PeerRefused if the peer refuses the stream, and ProtocolError if
        what came is not a frame (then the link is closed)."""
        if self._unsent:
            await self._write(b"")
        while True:
            if self._error:
                raise self._error
            frame = self._next_frame()
            if frame is not None and self._may_be_refused:
                self._may_be_refused = False
                self._raise_if_refused(frame)
            if frame is not None or self._end_received:
                return frame
            data = await self._read_pipe()
            self.link.stuck_beats = 0
            if not data:
                self._fail(LinkLost(f"{wire.short(self.link.peer)} abandoned the stream."))
            self._buffer += data

    async def _read_pipe(self) -> bytes:
        try:
            return await self._read()
        except LinkLost as lost:
            self._fail(lost)
            raise
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if self._error and task and not task.cancelling():
                raise self._error from None  # `abandon` has cancelled the read alone
            raise

    def _next_frame(self) -> bytes | None:
        start = wire.LENGTH.size
        if self._end_received or len(self._buffer) < start:
            return None
        (length,) = wire.LENGTH.unpack_from(self._buffer)
        if length == 0:
            self._end_received = True
            return None
        if length > self._max_bytes:
            sentence = f"a frame of {length} bytes was announced, and {self._max_bytes} are allowed"
            self._error = self.link.close_for_violation(sentence)
            raise self._error
        if len(self._buffer) < start + length:
            return None
        frame = bytes(self._buffer[start : start + length])
        del self._buffer[: start + length]
        return frame

    def _raise_if_refused(self, frame: bytes) -> None:
        try:
            refusal = _refusals.decode(frame)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return
        self.abandon()
        reason = wire.printable(refusal.message)
        raise PeerRefused(f"{wire.short(self.link.peer)} refused: {reason}", code=refusal.code)

    def abandon(self) -> None:
        """Stop both directions at once; the peer sees LinkLost.  What is on its way may be lost."""
        if not self._error and not (self._end_sent and self._end_received):
            self._fail(LinkLost("This side abandoned the stream."))

    def leave(self) -> None:
        """Do the same as `drain` in the background, where nobody waits for it."""
        self.link.spawn(self.drain())

    async def drain(self) -> None:
        """Finish, and discard what the peer sends until it has finished too: a stream counts among
        the few that its opener may have open until both have read its end, and what is on its way
        is lost if it is abandoned.  It is abandoned if that takes long."""
        try:
            async with asyncio.timeout(DRAIN_SECONDS):
                await self.finish()
                while await self.receive() is not None:
                    pass
                while await self._read_pipe():  # the end of the pipe comes after that of the frames
                    pass
        except TimeoutError:
            self._fail(LinkLost("This side abandoned the stream."))
        except PeeringError:
            pass  # it has ended otherwise

    def _fail(self, error: LinkLost) -> None:
        self._error = self._error or error
        self._read.cancel()
        self._buffer.clear()
        self._pipe.reset()


class Link:
    """A link to one peer, which has proven its key.  After the constructor comes `exchange_hello`.

    `dialed`: by this box.  `opened_at` is on the monotonic clock.  `version` is the agreed one of
    the protocol, `software` what the peer says that it runs, `clock_ahead` by how many seconds its
    clock was ahead of ours when the link began.  `streams` are those of either side that are for a
    purpose and still referenced.
    """

    def __init__(self, connection: Connection, options: LinkOptions, *, dialed: bool) -> None:
        self.peer, self.route = connection.peer, connection.route
        self.dialed, self.opened_at = dialed, 0.0
        self.version, self.software, self.clock_ahead = 0, "", 0.0
        self.streams: WeakSet[Stream] = WeakSet()
        self.stuck_beats = 0  # beats since the peer's program sent anything
        self._connection, self._options = connection, options
        self._accept = SharedCall(connection.accept)
        self._ending = TaskSet()
        self._tasks = [
            asyncio.create_task(self._send_heartbeats()),
            asyncio.create_task(self._receive_heartbeats()),
        ]
        self._end = asyncio.create_task(self._wait_until_closed())

    async def exchange_hello(self) -> None:
        """Exchange Hellos and agree on a version.  Raises LinkLost, ProtocolError."""
        ours = Hello(self._options.versions, __version__, self._options.clock())
        pipe = await (self._connection.open() if self.dialed else self._connection.accept())
        stream = Stream(self, pipe, max_bytes=wire.MAX_HELLO_BYTES)
        if self.dialed:
            await stream.send(wire.encode(ours))
            await stream.finish()
        try:
            theirs = wire.decode_hello(await stream.receive() or b"")
        except ProtocolError as error:
            sentence = f"the first frame is not a Hello: {error.message}"
            raise self.close_for_violation(sentence) from error
        self.software, self.clock_ahead = theirs.software, theirs.clock - self._options.clock()
        self.version = self._agree_on_version(ours, theirs)
        if not self.dialed:
            await stream.send(wire.encode(ours))
            await stream.finish()
        if await stream.receive() is not None:
            raise self.close_for_violation("a Hello is one frame, and there were two")
        self.opened_at = time.monotonic()

    def _agree_on_version(self, ours: Hello, theirs: Hello) -> int:
        common = set(ours.versions) & set(theirs.versions)
        if not common:
            raise self._close(
                Code.VERSION,
                f"this box speaks version {_versions(ours)}, yours {_versions(theirs)}: update the "
                "older of the two",
            )
        return max(common)

    async def open(self, opening: Open | None = None) -> Stream:
        """Open a stream for a purpose, which the peer sees with its first frame.  Waits while
        `wire.MAX_STREAMS` of ours are open, or a few less: the peer reports those that have ended
        in eighths of that.  Raises LinkLost; the stream's first `receive` may raise PeerRefused."""
        stream = Stream(self, await self._connection.open(), opening)
        if opening is not None:
            self.streams.add(stream)
        return stream

    async def accept(self) -> Stream:
        """Wait for the next stream that the peer opens.  Raises LinkLost."""
        return Stream(self, await self._accept())

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Do some work beside the caller, until the link ends."""
        self._ending.spawn(work)

    async def close(self, code: int, reason: str) -> None:
        """End all streams.  The peer gets code and reason, this cut at `wire.MAX_REASON_BYTES`."""
        self._close(code, reason)
        await self.closed()

    def close_for_violation(self, sentence: str) -> ProtocolError:
        """Close because of what the peer sent, and return the error to raise."""
        self._close(Code.PROTOCOL, sentence)
        return ProtocolError(f"{wire.short(self.peer)} broke the protocol: {sentence}.")

    def _close(self, code: int, reason: str) -> LinkLost:
        message = f"This box closed the link to {wire.short(self.peer)}: {reason.rstrip('.')}."
        lost = LinkLost(message, code=code, reason=reason)
        self._connection.close(lost)
        return lost

    async def closed(self) -> LinkLost:
        """Wait for the end; returns why."""
        return await asyncio.shield(self._end)

    async def _send_heartbeats(self) -> None:
        """Send heartbeats until the peer is silent or stuck for too long; then close."""
        options, now = self._options, asyncio.get_running_loop().time
        silent_beats = received_bytes = 0
        while silent_beats < options.max_silent and self.stuck_beats < options.max_stuck:
            self._connection.send_heartbeat()
            due = now() + options.beat_seconds
            await asyncio.sleep(options.beat_seconds)
            silent_beats, self.stuck_beats = silent_beats + 1, self.stuck_beats + 1
            before, received_bytes = received_bytes, self._connection.received_bytes()
            if received_bytes != before:
                silent_beats = 0
            # This process stood still itself: what came meanwhile may not be read yet.
            if now() > due + options.beat_seconds:
                silent_beats = self.stuck_beats = 0
        if silent_beats < options.max_silent:
            seconds = options.beat_seconds * options.max_stuck
            self._close(Code.SILENT, f"its machine answers, but not its program for {seconds:g} s")
        else:
            seconds = options.beat_seconds * options.max_silent
            self._close(Code.SILENT, f"nothing was heard from it for {seconds:g} s")

    async def _receive_heartbeats(self) -> None:
        """Until cancelled, at the link's end: an error alone is not that."""
        while True:
            try:
                await self._connection.receive_heartbeat()
                self.stuck_beats = 0
            except LinkLost:
                await asyncio.sleep(self._options.beat_seconds)

    async def _wait_until_closed(self) -> LinkLost:
        why = await self._connection.closed()
        for task in (*self._tasks, *self._ending):
            task.cancel()
        return why


def _versions(hello: Hello) -> str:
    versions = ", ".join(map(str, hello.versions))
    return f"{versions} of the protocol (software {hello.software})"
