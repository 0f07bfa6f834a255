"""Where the transport's tests happen: a peer in another process over iroh, or beside us in memory.

Both are driven alike, and record what the peer saw.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from nacl.signing import SigningKey

from pinaivu_box.transport.iroh_transport import IrohTransport
from pinaivu_box.transport.link import Link, LinkOptions, Stream
from tests.support import echo_peer
from tests.support.keys import new_identity
from tests.support.memory_transport import MemoryNetwork, MemoryTransport
from tests.support.paths import ROOT
from tests.support.process_box import environment
from tests.support.waiting import DEADLINE, soon


async def converse(link: Link, command: str) -> Stream:
    stream: Stream = await soon(link.open())
    await stream.send(command.encode())
    return stream


async def echo(link: Link, frame: bytes = b"hello") -> None:
    stream = await converse(link, "echo")
    await stream.send(frame)
    assert await soon(stream.receive()) == frame
    await stream.finish()
    assert await soon(stream.receive()) is None


class PeerProcess:
    """`tests.support.echo_peer` in a process of its own; `prefix` may put it somewhere else."""

    def __init__(
        self,
        host: str = "127.0.0.1",
        *known: str,
        seed: str | None = None,
        port: int = 0,
        prefix: Sequence[str] = (),
    ) -> None:
        self.seed = seed or SigningKey.generate().encode().hex()
        self.process = subprocess.Popen(
            [
                *prefix,
                sys.executable,
                "-m",
                "tests.support.echo_peer",
                host,
                self.seed,
                str(port),
                *known,
            ],
            stdout=subprocess.PIPE,
            bufsize=0,
            cwd=ROOT,
            env=environment(),
        )
        assert self.process.stdout is not None
        os.set_blocking(self.process.stdout.fileno(), False)
        self._seen: list[dict[str, Any]] = []
        self._rest = b""

    async def event(self, name: str, about: Collection[str] = ()) -> dict[str, Any]:
        """The next event of that name, if need be of links to one of those, that it tells or has
        told."""

        def wanted(one: dict[str, Any]) -> bool:
            return one["event"] == name and (not about or one["peer"] in about)

        async with asyncio.timeout(DEADLINE):
            while not (found := [one for one in self._seen if wanted(one)]):
                assert self.process.poll() is None, "the peer has died"
                await asyncio.sleep(0.02)
                self._read()
        self._seen.remove(found[0])
        return found[0]

    def forget(self) -> None:
        """What it has told; it would stop once its pipe is full."""
        self._read()
        self._seen.clear()

    def _read(self) -> None:
        assert self.process.stdout is not None
        *lines, self._rest = (self._rest + (self.process.stdout.read() or b"")).split(b"\n")
        self._seen += [json.loads(line) for line in lines]

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def end(self) -> None:
        assert self.process.stdout is not None
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()


class IrohPair:
    """Peers that have come to no harm are used again: it takes a second to start one."""

    options = LinkOptions(beat_seconds=0.5, max_silent=5)
    patience = 2.5  # seconds of silence that are borne
    spare: ClassVar[list[tuple[PeerProcess, dict[str, Any]]]] = []

    async def start(self) -> None:
        self.us: set[str] = set()
        if self.spare:
            self.peer, self._listening = self.spare.pop()
        else:
            self.peer = PeerProcess()
            self._listening = await self.peer.event("listening")
        self.node_id, self.addresses = self._listening["node_id"], self._listening["addresses"]
        self._unharmed = True
        self.ours = await self.transport()

    async def transport(self, **changes: Any) -> IrohTransport:
        options = replace(self.options, **changes)
        bound = await IrohTransport.bind(new_identity(), "127.0.0.1", 0, options=options)
        self.us.add(bound.node_id)
        return bound

    async def connect(self) -> Link:
        return await self.ours.connect(self.node_id, self.addresses, DEADLINE)

    async def event(self, name: str) -> dict[str, Any]:
        return await self.peer.event(name, self.us)

    def kill(self) -> None:
        self._harm(signal.SIGKILL)

    def stop(self) -> None:
        self._harm(signal.SIGSTOP)

    def go_on(self) -> None:
        self._harm(signal.SIGCONT)

    def _harm(self, number: signal.Signals) -> None:
        self._unharmed = False
        self.peer.signal(number)

    async def end(self) -> None:
        await self.ours.close()
        if self._unharmed and self.peer.process.poll() is None:
            self.peer.forget()
            self.spare.append((self.peer, self._listening))
        else:
            self.peer.end()

    @classmethod
    def end_all(cls) -> None:
        while cls.spare:
            cls.spare.pop()[0].end()


class MemoryPair:
    options = LinkOptions(beat_seconds=0.1)
    patience = 0.4

    async def start(self) -> None:
        self.network = MemoryNetwork()
        self._seen: list[dict[str, Any]] = []
        theirs = await self.transport()
        self.node_id, self.addresses = theirs.node_id, theirs.addresses()
        self._theirs = theirs
        self._serving = asyncio.create_task(echo_peer.serve(theirs, self._tell))
        self.ours = await self.transport()

    def _tell(self, event: str, **more: Any) -> None:
        self._seen.append({"event": event, **more})

    async def transport(self, **changes: Any) -> MemoryTransport:
        options = replace(self.options, **changes)
        return MemoryTransport(self.network, new_identity().node_id, options)

    async def connect(self) -> Link:
        return await self.ours.connect(self.node_id, self.addresses, DEADLINE)

    async def event(self, name: str) -> dict[str, Any]:
        async with asyncio.timeout(DEADLINE):
            while not (found := [one for one in self._seen if one["event"] == name]):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        self._seen.remove(found[0])
        return found[0]

    def kill(self) -> None:
        self.network.silence(self.node_id)

    stop = kill

    def go_on(self) -> None:
        self.network.hear(self.node_id)

    async def end(self) -> None:
        await self.ours.close()
        await self._theirs.close()
        await self._serving
