"""Links between boxes of one process, for tests and simulations: same frames, same heartbeats."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence

from pinaivu_box.errors import LinkLost, Unreachable, WrongPeer
from pinaivu_box.transport import wire
from pinaivu_box.transport.link import LinkOptions, LinkView
from pinaivu_box.transport.transport import Transport
from pinaivu_box.transport.wire import Code

WINDOW_BYTES = 1024 * 1024  # of a stream, each way


class MemoryNetwork:
    """The transports of all boxes, and the boxes that cannot be reached."""

    def __init__(self) -> None:
        self.transports: dict[str, MemoryTransport] = {}  # by address
        self._silent: set[str] = set()

    def silence(self, node_id: str) -> None:
        """From now on nothing comes from it or to it, as if it were stopped, or its cable out."""
        self._silent.add(node_id)

    def hear(self, node_id: str) -> None:
        self._silent.discard(node_id)
        for transport in self.transports.values():
            for connection in transport.connections:
                connection.wake()

    def silent(self, *node_ids: str) -> bool:
        return not self._silent.isdisjoint(node_ids)


class _Half:
    """A stream's bytes one way."""

    def __init__(self) -> None:
        self.taken = bytearray()
        self.finished = self.broken = False
        self._changed = asyncio.Event()

    @property
    def over(self) -> bool:
        return self.broken or (self.finished and not self.taken)

    def wake(self) -> None:
        self._changed.set()

    async def until(self, ready: Callable[[], bool], connection: MemoryConnection) -> None:
        """Wait; LinkLost once that is in vain."""
        while not (self.broken or connection.why or ready()):
            self._changed.clear()
            await self._changed.wait()
        if connection.why:
            raise connection.why
        if self.broken:
            raise LinkLost(f"{wire.short(connection.peer)} abandoned the stream.")


class MemoryPipe:
    def __init__(self, connection: MemoryConnection, incoming: _Half, outgoing: _Half) -> None:
        self._connection = connection
        self._incoming = incoming
        self._outgoing = outgoing

    @property
    def over(self) -> bool:
        return self._incoming.over and self._outgoing.over

    async def read(self) -> bytes:
        half = self._incoming
        await half.until(lambda: bool(half.taken or half.finished), self._connection)
        data = bytes(half.taken)
        half.taken.clear()
        self.wake()
        return data

    async def write(self, data: bytes) -> None:
        half = self._outgoing

        def room() -> bool:
            return len(half.taken) < WINDOW_BYTES and not self._connection.silent

        for start in range(0, len(data), WINDOW_BYTES):
            await half.until(room, self._connection)
            chunk = data[start : start + WINDOW_BYTES]
            half.taken += chunk
            self._connection.arrive(len(chunk))
            half.wake()

    async def finish(self) -> None:
        half = self._outgoing
        await half.until(lambda: not self._connection.silent, self._connection)
        half.finished = True
        self.wake()

    def reset(self) -> None:
        self._incoming.broken = self._outgoing.broken = True
        self.wake()

    def wake(self) -> None:
        self._incoming.wake()
        self._outgoing.wake()
        if self.over:
            self._connection.make_room()


class MemoryConnection:
    """One end; `other` is the one at the peer."""

    other: MemoryConnection

    def __init__(self, network: MemoryNetwork, own: MemoryTransport, peer: MemoryTransport) -> None:
        self.peer = peer.node_id
        self.why: LinkLost | None = None
        self._network = network
        self._own = own
        self._address = peer.address
        self._pipes: set[MemoryPipe] = set()  # our ends of all streams
        self._opened: set[MemoryPipe] = set()  # of those that we opened
        self._arrived: deque[MemoryPipe] = deque()
        self._beats = 0
        self._received = 0
        self._changed = asyncio.Event()
        own.connections.add(self)

    @property
    def silent(self) -> bool:
        return self._network.silent(self.peer, self._own.node_id)

    async def itself(self) -> MemoryConnection:
        return self  # there are no hands to shake

    async def open(self) -> MemoryPipe:
        await self._until(lambda: len(self._opened) < wire.MAX_STREAMS and not self.silent)
        there, back = _Half(), _Half()
        pipe, far = MemoryPipe(self, back, there), MemoryPipe(self.other, there, back)
        self._pipes.add(pipe)
        self._opened.add(pipe)
        self.other._pipes.add(far)
        self.other._arrived.append(far)
        self.other._changed.set()
        return pipe

    async def accept(self) -> MemoryPipe:
        await self._until(lambda: bool(self._arrived))
        return self._arrived.popleft()

    def send_heartbeat(self) -> None:
        if not self.silent:
            self.other._beats += 1
            self.arrive(1)
            self.other._changed.set()

    def arrive(self, size: int) -> None:
        """So many bytes reach the peer."""
        self.other._received += size

    def received_bytes(self) -> int:
        return self._received

    async def receive_heartbeat(self) -> None:
        await self._until(lambda: self._beats > 0)
        self._beats = 0

    def close(self, why: LinkLost) -> None:
        if self.why is None:
            self._end(why)
            if not self.silent:
                reason = wire.printable(wire.cut(why.reason).decode())
                message = f"{wire.short(self._own.node_id)} closed the link: {reason.rstrip('.')}."
                self.other._end(LinkLost(message, code=why.code, reason=reason))

    def _end(self, why: LinkLost) -> None:
        self.why = self.why or why
        self._own.connections.discard(self)
        self.wake()

    async def closed(self) -> LinkLost:
        while self.why is None:
            self._changed.clear()
            await self._changed.wait()
        return self.why

    def route(self) -> LinkView:
        return LinkView(direct=True, address=self._address, rtt_ms=0.0)

    def make_room(self) -> None:
        """Forget the streams that are over, at both ends."""
        for end in (self, self.other):
            end._pipes = {pipe for pipe in end._pipes if not pipe.over}
            end._opened &= end._pipes
            end._changed.set()

    def wake(self) -> None:
        self._changed.set()
        for pipe in tuple(self._pipes):
            pipe.wake()

    async def _until(self, ready: Callable[[], bool]) -> None:
        while not (self.why or ready()):
            self._changed.clear()
            await self._changed.wait()
        if self.why:
            raise self.why


class MemoryTransport(Transport):
    def __init__(
        self,
        network: MemoryNetwork,
        node_id: str,
        options: LinkOptions | None = None,
        address: str | None = None,
    ) -> None:
        super().__init__(node_id, options)
        self.address = address or f"memory:{len(network.transports) + 1}"
        self.connections: set[MemoryConnection] = set()
        self._network = network
        network.transports[self.address] = self

    def addresses(self) -> list[str]:
        return [self.address]

    async def wait_for_addresses(self) -> None:
        pass

    async def dial(self, node_id: str, addresses: Sequence[str]) -> MemoryConnection:
        """As `Transport.dial`; waits for ever if no box answers."""
        if not addresses:
            raise Unreachable("There is no address to connect to (none is known).")
        transports = map(self._network.transports.get, addresses)
        answering = [
            transport
            for transport in transports
            if transport and not self._network.silent(transport.node_id, self.node_id)
        ]
        if not answering:
            await asyncio.Event().wait()
        peer = next((each for each in answering if each.node_id == node_id), None)
        if peer is None:
            raise WrongPeer(f"{WrongPeer.beginning}{wire.short(node_id)} answers there.")
        here = MemoryConnection(self._network, self, peer)
        there = MemoryConnection(self._network, peer, self)
        here.other, there.other = there, here
        if peer.make_room():
            peer.upgrade_inbound(there.itself)
        else:
            here.close(LinkLost("The peer is busy.", code=Code.BUSY))
        return here

    async def close(self) -> None:
        self._network.transports.pop(self.address, None)
        await super().close()
