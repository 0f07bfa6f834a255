"""Links and streams as `transport` promises them, made of a plain encrypted connection."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from pinaivu_box import __version__
from pinaivu_box.errors import LinkLost, PeeringError, ProtocolError
from pinaivu_box.transport import wire
from pinaivu_box.transport.transport import LinkFacts, LinkRoute
from pinaivu_box.transport.wire import Code, Hello

T = TypeVar("T")


class Pipe(Protocol):
    """One stream of bytes, both ways; all raise LinkLost."""

    async def read(self) -> bytes:
        """What has come, but not much over 100 kB; b"" once the peer has finished."""

    async def write(self, data: bytes) -> None:
        """Wait until all of it is in the sending window."""

    async def finish(self) -> None: ...

    def reset(self) -> None:
        """Stop both ways, at once."""


class Connection(Protocol):
    """Pipes and heartbeats to a peer that has proven its key; all that wait raise LinkLost."""

    peer: str

    async def open(self) -> Pipe: ...

    async def accept(self) -> Pipe: ...

    def beat(self) -> None:
        """Send a heartbeat, which may get lost."""

    async def heard(self) -> None:
        """The peer's next heartbeat."""

    def received(self) -> int:
        """How much has come so far, of any kind: it only grows."""

    def close(self, why: LinkLost) -> None:
        """At once; the peer gets `why.code` and `why.reason`, our own side raises `why`."""

    async def closed(self) -> LinkLost:
        """Wait for the end, which after `close` has come."""

    def route(self) -> LinkRoute: ...


@dataclass(frozen=True)
class HeartbeatTiming:
    """Seconds between heartbeats; after how many of ours it is over if nothing at all has come
    (`patience`), and if the peer's machine answers, but its program says nothing (`stuck`).

    Counted in beats, not in seconds: a process that was stopped itself gives its peers time.
    """

    beat: float = 1.0
    patience: int = 4
    stuck: int = 30


class SharedCall(Generic[T]):
    """A call that goes on when its caller is cancelled: the next caller gets what it gave.

    Cancelled itself, a call to iroh can lose what it was about to return.
    """

    def __init__(self, call: Callable[[], Awaitable[T]]) -> None:
        self._call = call
        self._task: asyncio.Future[T] | None = None

    async def __call__(self) -> T:
        if self._task is None:
            self._task = asyncio.ensure_future(self._call())
            self._task.add_done_callback(_look_at)
        result = await asyncio.shield(self._task)
        self._task = None
        return result

    def cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()


def _look_at(task: asyncio.Future[T]) -> None:
    """Nobody may be left to ask how it ended, and asyncio would complain."""
    if not task.cancelled():
        task.exception()


class FramedStream:
    def __init__(self, link: PeerLink, pipe: Pipe, limit: int) -> None:
        self._link = link
        self._pipe = pipe
        self._limit = limit
        self._read = SharedCall(pipe.read)
        self._inbox = bytearray()
        self._sending = asyncio.Lock()
        self._said_end = self._heard_end = False
        self._broken: LinkLost | ProtocolError | None = None

    async def send(self, *frames: bytes) -> None:
        for frame in frames:
            if not 0 < len(frame) <= wire.MAX_FRAME_BYTES:
                raise ValueError(f"a frame has 1 to {wire.MAX_FRAME_BYTES} bytes, not {len(frame)}")
        await self._write(b"".join(wire.LENGTH.pack(len(frame)) + frame for frame in frames))

    async def finish(self) -> None:
        if not self._said_end:
            await self._write(wire.END_FRAME)
            self._said_end = True
            await self._pipe.finish()

    async def _write(self, data: bytes) -> None:
        async with self._sending:
            if self._broken:
                raise self._broken
            if self._said_end:
                raise ValueError("nothing is sent after the end")
            try:
                await self._pipe.write(data)
            except LinkLost as lost:
                self._break(lost)
                raise
            except asyncio.CancelledError:
                self.abandon()
                raise

    async def receive(self) -> bytes | None:
        while True:
            if self._broken:
                raise self._broken
            if (frame := self._next_frame()) is not None or self._heard_end:
                return frame
            chunk = await self._read_on()
            self._link.mute = 0
            if not chunk:
                self._break(LinkLost(f"{wire.short(self._link.peer)} abandoned the stream."))
            self._inbox += chunk

    async def _read_on(self) -> bytes:
        try:
            return await self._read()
        except LinkLost as lost:
            self._break(lost)
            raise
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if self._broken and task and not task.cancelling():
                raise self._broken from None  # only the read was cancelled, by our abandoning
            raise

    def _next_frame(self) -> bytes | None:
        start = wire.LENGTH.size
        if self._heard_end or len(self._inbox) < start:
            return None
        (length,) = wire.LENGTH.unpack_from(self._inbox)
        if length == 0:
            self._heard_end = True
            return None
        if length > self._limit:
            sentence = f"a frame of {length} bytes was announced, and {self._limit} are allowed"
            self._broken = self._link.accuse(sentence)
            raise self._broken
        if len(self._inbox) < start + length:
            return None
        frame = bytes(self._inbox[start : start + length])
        del self._inbox[: start + length]
        return frame

    def abandon(self) -> None:
        if not self._broken and not (self._said_end and self._heard_end):
            self._break(LinkLost("This side abandoned the stream."))

    def _break(self, why: LinkLost) -> None:
        self._broken = self._broken or why
        self._read.cancel()
        self._inbox.clear()
        self._pipe.reset()


class PeerLink:
    """`ended` is called once, when it is over.  After the constructor it must be greeted."""

    def __init__(
        self, connection: Connection, pace: HeartbeatTiming, ended: Callable[[PeerLink], None]
    ) -> None:
        self.peer = connection.peer
        self.mute = 0  # beats since the peer's program said anything
        self._connection = connection
        self._pace = pace
        self._accept = SharedCall(connection.accept)
        self._hello = Hello(versions=(0,), software="", clock=0.0)
        self._version = 0
        self._clock_ahead = 0.0
        self._tasks = [asyncio.create_task(self._beat()), asyncio.create_task(self._listen())]
        self._end = asyncio.create_task(self._wait_for_the_end(ended))

    async def greet(self, ours: Hello, clock: Callable[[], float], *, first: bool) -> None:
        """Exchange Hellos; `first` is who made the connection.  LinkLost, ProtocolError."""
        pipe = await (self._connection.open() if first else self._connection.accept())
        stream = FramedStream(self, pipe, wire.MAX_HELLO_BYTES)
        if first:
            await stream.send(wire.encode(ours))
            await stream.finish()
        try:
            self._hello = wire.decode_hello(await stream.receive() or b"")
        except ProtocolError as error:
            raise self.accuse(f"the first frame is no Hello: {error.message}") from error
        self._clock_ahead = self._hello.clock - clock()
        self._agree(ours)
        if not first:
            await stream.send(wire.encode(ours))
            await stream.finish()
        if await stream.receive() is not None:
            raise self.accuse("a Hello is one frame, and there were two")

    def _agree(self, ours: Hello) -> None:
        common = set(ours.versions) & set(self._hello.versions)
        if not common:
            spoken, heard = (
                f"{versions} of the protocol (software {software})"
                for versions, software in (
                    (", ".join(map(str, one.versions)), one.software) for one in (ours, self._hello)
                )
            )
            reason = f"this box speaks version {spoken}, yours {heard}: update the older of the two"
            raise self._close(Code.VERSION, reason)
        self._version = max(common)

    async def open(self) -> FramedStream:
        return FramedStream(self, await self._connection.open(), wire.MAX_FRAME_BYTES)

    async def accept(self) -> FramedStream:
        return FramedStream(self, await self._accept(), wire.MAX_FRAME_BYTES)

    async def close(self, code: int, reason: str) -> None:
        self._close(code, reason)
        await self.closed()

    def accuse(self, sentence: str) -> ProtocolError:
        """Close because of what the peer sent; returns what is to be raised."""
        self._close(Code.PROTOCOL, sentence)
        return ProtocolError(f"{wire.short(self.peer)} broke the protocol: {sentence}.")

    def _close(self, code: int, reason: str) -> LinkLost:
        message = f"This box closed the link to {wire.short(self.peer)}: {reason.rstrip('.')}."
        lost = LinkLost(message, code=code, reason=reason)
        self._connection.close(lost)
        return lost

    async def closed(self) -> LinkLost:
        return await asyncio.shield(self._end)

    def facts(self) -> LinkFacts:
        return LinkFacts(
            self._connection.route(), self._version, self._hello.software, self._clock_ahead
        )

    async def _beat(self) -> None:
        pace, now = self._pace, asyncio.get_running_loop().time
        quiet = received = 0
        while quiet < pace.patience and self.mute < pace.stuck:
            self._connection.beat()
            due = now() + pace.beat
            await asyncio.sleep(pace.beat)
            quiet, self.mute = quiet + 1, self.mute + 1
            before, received = received, self._connection.received()
            if received != before:
                quiet = 0
            if now() > due + pace.beat:  # we stood still ourselves: what came may not be read yet
                quiet = self.mute = 0
        if quiet < pace.patience:
            seconds = pace.beat * pace.stuck
            self._close(Code.SILENT, f"its machine answers, but not its program for {seconds:g} s")
        else:
            seconds = pace.beat * pace.patience
            self._close(Code.SILENT, f"nothing was heard from it for {seconds:g} s")

    async def _listen(self) -> None:
        """Until cancelled, at the link's end: an error alone is not that."""
        while True:
            try:
                await self._connection.heard()
                self.mute = 0
            except LinkLost:
                await asyncio.sleep(self._pace.beat)

    async def _wait_for_the_end(self, ended: Callable[[PeerLink], None]) -> LinkLost:
        why = await self._connection.closed()
        for task in self._tasks:
            task.cancel()
        ended(self)
        return why


GREETING_SECONDS = 10.0
MAX_GREETINGS = 32  # strangers at a time
_PATIENCE = 1.0  # seconds; who takes longer to greet makes room for others
MAX_WAITING = 64  # links that nobody has accepted yet
GOODBYE = "the box is shutting down"

log = logging.getLogger(__name__)


class Handshake:
    """`versions` of the protocol, the `pace` of heartbeats and the wall `clock` are for tests and
    simulations to choose."""

    def __init__(
        self,
        *,
        versions: Sequence[int] = wire.VERSIONS,
        pace: HeartbeatTiming | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._versions = tuple(versions)
        self._pace = pace or HeartbeatTiming()
        self._clock = clock
        self._greetings: dict[asyncio.Task[None], float] = {}  # since when, the oldest first
        self._waiting: deque[PeerLink] = deque()
        self._arrived = asyncio.Event()
        # A connection that nobody holds is closed by the garbage collector.
        self._links: set[PeerLink] = set()
        self._closed = False

    @property
    def full(self) -> bool:
        """Whether nobody can be greeted now.  If so many are silent, the first of them has to go:
        else a few strangers could keep members out."""
        while len(self._greetings) >= MAX_GREETINGS:
            first, since = next(iter(self._greetings.items()))
            if time.monotonic() - since < _PATIENCE:
                return True
            del self._greetings[first]
            first.cancel()
        return self._closed

    def receive(self, handshake: Callable[[], Awaitable[Connection]]) -> None:
        """Greet who is at the door, in a task of its own; not if `full`."""
        task = asyncio.create_task(self._receive(handshake))
        self._greetings[task] = time.monotonic()
        task.add_done_callback(lambda task: self._greetings.pop(task, None))

    async def _receive(self, handshake: Callable[[], Awaitable[Connection]]) -> None:
        try:
            async with asyncio.timeout(GREETING_SECONDS):
                link = await self._greet(await handshake(), first=False)
        except (PeeringError, TimeoutError) as error:
            log.debug("somebody was not greeted: %s", error)
            return
        if len(self._waiting) >= MAX_WAITING:
            await link.close(Code.BUSY, "this box has too many new links to look at: try again")
            return
        self._waiting.append(link)
        self._arrived.set()

    async def join(self, connection: Connection) -> PeerLink:
        """Greet whom we have called.  LinkLost, ProtocolError."""
        return await self._greet(connection, first=True)

    async def _greet(self, connection: Connection, *, first: bool) -> PeerLink:
        link = PeerLink(connection, self._pace, self._links.discard)
        self._links.add(link)
        ours = Hello(self._versions, __version__, self._clock())
        try:
            await link.greet(ours, self._clock, first=first)
        except BaseException:
            # Only the first closing counts: if there was a better reason, the peer has it.
            code, reason = Code.SILENT, f"the greeting was not over within {GREETING_SECONDS:g} s"
            if self._closed:
                code, reason = Code.SHUTDOWN, GOODBYE
            connection.close(LinkLost(reason, code=code, reason=reason))
            raise
        return link

    async def accept(self) -> PeerLink:
        while not self._waiting:
            if self._closed:
                raise LinkLost("The transport is closed.", code=Code.SHUTDOWN)
            self._arrived.clear()
            await self._arrived.wait()
        return self._waiting.popleft()

    async def close(self) -> None:
        self._closed = True
        self._arrived.set()
        for task in tuple(self._greetings):
            task.cancel()
        links = tuple(self._links)
        await asyncio.gather(*[link.close(Code.SHUTDOWN, GOODBYE) for link in links])
        self._waiting.clear()
