"""Links and streams as `transport` defines them, made of a plain encrypted connection: handshake,
framing, heartbeats."""

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
from pinaivu_box.tasks import ignore_exception
from pinaivu_box.transport import wire
from pinaivu_box.transport.transport import LinkFacts, LinkRoute
from pinaivu_box.transport.wire import Code, Hello

HANDSHAKE_SECONDS = 10.0
MAX_INBOUND_HANDSHAKES = 32  # with strangers, at a time
MAX_UNACCEPTED_LINKS = 64
_EVICTION_SECONDS = 1.0  # a handshake that takes longer makes room for others
SHUTDOWN_REASON = "the box is shutting down"

log = logging.getLogger(__name__)
T = TypeVar("T")


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

    def route(self) -> LinkRoute: ...


@dataclass(frozen=True)
class HeartbeatTiming:
    """`interval`: seconds between two heartbeats.  The link is lost after `max_silent` beats of
    ours in which nothing at all came, and after `max_stuck` in which the peer's machine answered,
    but its program sent nothing.

    Beats are counted, not seconds: a process that was stopped itself gives its peers time.
    """

    interval: float = 1.0
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


class FramedStream:
    """A `transport.Stream` over a pipe, whose frames have at most `max_bytes`."""

    def __init__(self, link: PeerLink, pipe: Pipe, max_bytes: int) -> None:
        self._link = link
        self._pipe = pipe
        self._max_bytes = max_bytes
        self._read = SharedCall(pipe.read)
        self._buffer = bytearray()
        self._sending = asyncio.Lock()
        self._end_sent = self._end_received = False
        self._error: LinkLost | ProtocolError | None = None

    async def send(self, *frames: bytes) -> None:
        for frame in frames:
            if not 0 < len(frame) <= wire.MAX_FRAME_BYTES:
                raise ValueError(f"a frame has 1 to {wire.MAX_FRAME_BYTES} bytes, not {len(frame)}")
        await self._write(b"".join(wire.LENGTH.pack(len(frame)) + frame for frame in frames))

    async def finish(self) -> None:
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
            try:
                await self._pipe.write(data)
            except LinkLost as lost:
                self._fail(lost)
                raise
            except asyncio.CancelledError:
                self.abandon()
                raise

    async def receive(self) -> bytes | None:
        while True:
            if self._error:
                raise self._error
            if (frame := self._next_frame()) is not None or self._end_received:
                return frame
            data = await self._read_pipe()
            self._link.stuck_beats = 0
            if not data:
                self._fail(LinkLost(f"{wire.short(self._link.peer)} abandoned the stream."))
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
            self._error = self._link.close_for_violation(sentence)
            raise self._error
        if len(self._buffer) < start + length:
            return None
        frame = bytes(self._buffer[start : start + length])
        del self._buffer[: start + length]
        return frame

    def abandon(self) -> None:
        if not self._error and not (self._end_sent and self._end_received):
            self._fail(LinkLost("This side abandoned the stream."))

    def _fail(self, error: LinkLost) -> None:
        self._error = self._error or error
        self._read.cancel()
        self._buffer.clear()
        self._pipe.reset()


class PeerLink:
    """A `transport.Link`.  `on_closed` is called once, when it is over.  After the constructor
    comes `exchange_hello`."""

    def __init__(
        self,
        connection: Connection,
        heartbeats: HeartbeatTiming,
        on_closed: Callable[[PeerLink], None],
    ) -> None:
        self.peer = connection.peer
        self.stuck_beats = 0  # beats since the peer's program sent anything
        self._connection = connection
        self._heartbeats = heartbeats
        self._accept = SharedCall(connection.accept)
        self._hello = Hello(versions=(0,), software="", clock=0.0)
        self._version = 0
        self._clock_ahead = 0.0
        self._tasks = [
            asyncio.create_task(self._send_heartbeats()),
            asyncio.create_task(self._receive_heartbeats()),
        ]
        self._end = asyncio.create_task(self._wait_until_closed(on_closed))

    async def exchange_hello(
        self, ours: Hello, clock: Callable[[], float], *, initiator: bool
    ) -> None:
        """Exchange Hellos and agree on a version; the `initiator` made the connection.  Raises
        LinkLost, ProtocolError."""
        pipe = await (self._connection.open() if initiator else self._connection.accept())
        stream = FramedStream(self, pipe, wire.MAX_HELLO_BYTES)
        if initiator:
            await stream.send(wire.encode(ours))
            await stream.finish()
        try:
            self._hello = wire.decode_hello(await stream.receive() or b"")
        except ProtocolError as error:
            sentence = f"the first frame is not a Hello: {error.message}"
            raise self.close_for_violation(sentence) from error
        self._clock_ahead = self._hello.clock - clock()
        self._agree_on_version(ours)
        if not initiator:
            await stream.send(wire.encode(ours))
            await stream.finish()
        if await stream.receive() is not None:
            raise self.close_for_violation("a Hello is one frame, and there were two")

    def _agree_on_version(self, ours: Hello) -> None:
        theirs = self._hello
        common = set(ours.versions) & set(theirs.versions)
        if not common:
            raise self._close(
                Code.VERSION,
                f"this box speaks version {_versions(ours)}, yours {_versions(theirs)}: update the "
                "older of the two",
            )
        self._version = max(common)

    async def open(self) -> FramedStream:
        return FramedStream(self, await self._connection.open(), wire.MAX_FRAME_BYTES)

    async def accept(self) -> FramedStream:
        return FramedStream(self, await self._accept(), wire.MAX_FRAME_BYTES)

    async def close(self, code: int, reason: str) -> None:
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
        return await asyncio.shield(self._end)

    def facts(self) -> LinkFacts:
        return LinkFacts(
            self._connection.route(), self._version, self._hello.software, self._clock_ahead
        )

    async def _send_heartbeats(self) -> None:
        """Send heartbeats until the peer is silent or stuck for too long; then close."""
        timing, now = self._heartbeats, asyncio.get_running_loop().time
        silent_beats = received_bytes = 0
        while silent_beats < timing.max_silent and self.stuck_beats < timing.max_stuck:
            self._connection.send_heartbeat()
            due = now() + timing.interval
            await asyncio.sleep(timing.interval)
            silent_beats, self.stuck_beats = silent_beats + 1, self.stuck_beats + 1
            before, received_bytes = received_bytes, self._connection.received_bytes()
            if received_bytes != before:
                silent_beats = 0
            # This process stood still itself: what came meanwhile may not be read yet.
            if now() > due + timing.interval:
                silent_beats = self.stuck_beats = 0
        if silent_beats < timing.max_silent:
            seconds = timing.interval * timing.max_stuck
            self._close(Code.SILENT, f"its machine answers, but not its program for {seconds:g} s")
        else:
            seconds = timing.interval * timing.max_silent
            self._close(Code.SILENT, f"nothing was heard from it for {seconds:g} s")

    async def _receive_heartbeats(self) -> None:
        """Until cancelled, at the link's end: an error alone is not that."""
        while True:
            try:
                await self._connection.receive_heartbeat()
                self.stuck_beats = 0
            except LinkLost:
                await asyncio.sleep(self._heartbeats.interval)

    async def _wait_until_closed(self, on_closed: Callable[[PeerLink], None]) -> LinkLost:
        why = await self._connection.closed()
        for task in self._tasks:
            task.cancel()
        on_closed(self)
        return why


def _versions(hello: Hello) -> str:
    versions = ", ".join(map(str, hello.versions))
    return f"{versions} of the protocol (software {hello.software})"


class Handshake:
    """Upgrades connections, of whatever carrier, to links and keeps these until they end."""

    def __init__(
        self,
        *,
        versions: Sequence[int] = wire.VERSIONS,
        heartbeats: HeartbeatTiming | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`versions` of the protocol, the timing of `heartbeats` and the wall `clock` are for tests
        and simulations to choose."""
        self._versions = tuple(versions)
        self._heartbeats = heartbeats or HeartbeatTiming()
        self._clock = clock
        self._inbound: dict[asyncio.Task[None], float] = {}  # begun when, the oldest first
        self._unaccepted: deque[PeerLink] = deque()
        self._arrived = asyncio.Event()
        # A connection without a reference is closed by the garbage collector.
        self._links: set[PeerLink] = set()
        self._closed = False

    def make_room(self) -> bool:
        """Return whether a handshake can begin now.  If there are too many, the oldest one is
        cancelled if it has had enough time: else a few silent strangers could keep members out."""
        while len(self._inbound) >= MAX_INBOUND_HANDSHAKES:
            oldest, began = next(iter(self._inbound.items()))
            if time.monotonic() - began < _EVICTION_SECONDS:
                return False
            del self._inbound[oldest]
            oldest.cancel()
        return not self._closed

    def upgrade_inbound(self, connect: Callable[[], Awaitable[Connection]]) -> None:
        """Make a link of a connection that a peer begins, in a task; after `make_room`."""
        task = asyncio.create_task(self._upgrade_inbound(connect))
        self._inbound[task] = time.monotonic()
        task.add_done_callback(lambda task: self._inbound.pop(task, None))

    async def _upgrade_inbound(self, connect: Callable[[], Awaitable[Connection]]) -> None:
        try:
            async with asyncio.timeout(HANDSHAKE_SECONDS):
                link = await self._upgrade(await connect(), initiator=False)
        except (PeeringError, TimeoutError) as error:
            log.debug("an inbound handshake failed: %s", error)
            return
        if len(self._unaccepted) >= MAX_UNACCEPTED_LINKS:
            await link.close(Code.BUSY, "this box has too many new links: try again")
            return
        self._unaccepted.append(link)
        self._arrived.set()

    async def upgrade_outbound(self, connection: Connection) -> PeerLink:
        """Make a link of a connection that we have begun.  Raises LinkLost, ProtocolError."""
        return await self._upgrade(connection, initiator=True)

    async def _upgrade(self, connection: Connection, *, initiator: bool) -> PeerLink:
        link = PeerLink(connection, self._heartbeats, self._links.discard)
        self._links.add(link)
        hello = Hello(self._versions, __version__, self._clock())
        try:
            await link.exchange_hello(hello, self._clock, initiator=initiator)
        except BaseException:
            # Only the first closing counts: if there was a better reason, the peer has it.
            code, reason = Code.SILENT, f"the handshake took over {HANDSHAKE_SECONDS:g} s"
            if self._closed:
                code, reason = Code.SHUTDOWN, SHUTDOWN_REASON
            connection.close(LinkLost(reason, code=code, reason=reason))
            raise
        return link

    async def accept(self) -> PeerLink:
        """Wait for the next inbound link.  Raises LinkLost once the transport is closed."""
        while not self._unaccepted:
            if self._closed:
                raise LinkLost("The transport is closed.", code=Code.SHUTDOWN)
            self._arrived.clear()
            await self._arrived.wait()
        return self._unaccepted.popleft()

    async def close(self) -> None:
        """End all handshakes and links."""
        self._closed = True
        self._arrived.set()
        for task in tuple(self._inbound):
            task.cancel()
        links = tuple(self._links)
        await asyncio.gather(*[link.close(Code.SHUTDOWN, SHUTDOWN_REASON) for link in links])
        self._unaccepted.clear()
