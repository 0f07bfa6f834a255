"""A member, and strangers, over real links to a real server: floods, silence and garbage."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import pytest

from pinaivu_box.errors import LinkLost, PeeringError
from pinaivu_box.legs import wire as leg_wire
from pinaivu_box.membership import joining, tickets
from pinaivu_box.transport import wire
from pinaivu_box.transport.iroh_transport import IrohTransport
from pinaivu_box.transport.wire import Open
from tests.support.in_process_command import run_command_json
from tests.support.keys import new_identity
from tests.support.process_box import Box
from tests.support.waiting import DEADLINE, soon

pytestmark = pytest.mark.anyio
SETTINGS = '[peering]\nhost = "127.0.0.1"\nport = 0\nname = "anna"\n'
MEGABYTES = (
    200  # that all of this may make the server grow; what was announced is thousands of them
)
STREAMS = 10_000


def resident(box: Box) -> int:
    """Of the server alone, in bytes."""
    pages = int(Path(f"/proc/{box.process.pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE")


class Attacker:
    """A member of the network that the ticket is for, with a link of its own."""

    def __init__(self, ticket: str) -> None:
        self._ticket = tickets.decode(ticket)
        self.server, self.addresses = self._ticket.node_id, self._ticket.addresses

    async def join(self) -> Attacker:
        self.transport = await IrohTransport.bind(new_identity(), "127.0.0.1", 0)
        self.link = await self.transport.connect(self.server, self.addresses, 20)
        stream = await self.open(joining.PURPOSE)
        await stream.send(wire.encode(joining.JoinRequest(self._ticket.secret, "mallory")))
        await stream.finish()
        assert b"Welcome" in await soon(stream.receive())
        await self._gossip()
        return self

    async def link_again(self) -> None:
        """Or by a link that the server has made at the same time: of two it keeps one."""
        connect = partial(self.transport.connect, self.server, self.addresses, 20)
        for call in (connect, self.transport.accept) * 20:
            try:
                self.link = await asyncio.wait_for(call(), 20 if call is connect else 2)
                if call is connect:  # the gossip of its own links the server begins itself
                    await self._gossip()
                stream = await self.open("nothing")
                assert b"Refusal" in await soon(stream.receive())
            except TimeoutError:
                continue
            except LinkLost as lost:
                assert lost.code in (wire.Code.SECOND, wire.Code.FORBIDDEN), lost
            else:
                return
        raise AssertionError("it was not let in again")

    async def _gossip(self) -> None:
        self.gossip = await soon(self.link.open())
        await self.gossip.send(wire.encode(Open("gossip")))

    async def open(self, purpose: str = leg_wire.PURPOSE) -> Any:
        stream = await soon(self.link.open())
        await stream.send(wire.encode(Open(purpose)))
        return stream


@pytest.fixture(scope="module")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Box]:
    home = tmp_path_factory.mktemp("iroh") / "anna"
    home.mkdir()
    (home / "config.toml").write_text(SETTINGS)
    box = Box(home, "--model", "fake:1=fake:0", "--peering").start()
    box.chat(model="fake:1", max_tokens=1)
    yield box
    assert box.stop() == 0
    assert "Traceback" not in box.errors, box.errors
    box.end()


@pytest.fixture(scope="module")
def ticket(server: Box) -> str:
    made: str = run_command_json("peers", "invite", "--uses", "9", home=server.home)["ticket"]
    return made


@pytest.fixture
async def attacker(server: Box, ticket: str) -> AsyncIterator[Attacker]:
    """Whatever it does, the server goes on serving, and does not swell."""
    before = resident(server)
    made = await Attacker(ticket).join()
    yield made
    answer = await asyncio.to_thread(server.chat, model="fake:1", max_tokens=5)
    assert answer.status_code == 200, answer.text
    grown = (resident(server) - before) / 2**20
    assert grown < MEGABYTES, f"{grown:.0f} MiB more"
    await made.link_again()  # it is let in again, until somebody removes it
    await made.transport.close()


async def test_frames_of_two_gigabytes_are_not_read(attacker: Attacker) -> None:
    stream = await attacker.open()
    await stream._pipe.write(wire.LENGTH.pack(2**31 - 1) + bytes(1_000_000))
    lost = await soon(attacker.link.closed())
    assert lost.code == 400 and "2147483647 bytes was announced" in lost.reason


async def test_ten_thousand_streams_one_after_another(server: Box, attacker: Attacker) -> None:
    """Begun and left; and meanwhile the server's own clients are served."""

    async def flood(count: int) -> None:
        for number in range(count):
            pipe = await attacker.link._connection.open()
            if number % 2:
                await pipe.write(wire.LENGTH.pack(9) + b"some")
            pipe.reset()

    flooding = asyncio.gather(*(flood(STREAMS // 50) for _ in range(50)))
    served = 0
    while not flooding.done():
        answer = await asyncio.to_thread(server.chat, model="fake:1", max_tokens=5)
        assert answer.status_code == 200
        served += 1
    await flooding
    assert served


async def test_as_many_streams_as_one_may_have_and_not_one_more(attacker: Attacker) -> None:
    streams, most = [], wire.MAX_STREAMS
    with pytest.raises(TimeoutError):
        for number in range(STREAMS):
            async with asyncio.timeout(DEADLINE if number <= most * 3 // 4 else 1):
                stream = await attacker.link.open()
            await stream.send(wire.encode(Open(leg_wire.PURPOSE)))
            streams.append(stream)
    assert most * 3 // 4 < len(streams) <= most
    await attacker.link.close(1, "enough")


async def test_garbage_of_all_kinds(attacker: Attacker) -> None:
    random = Random(1)
    host, _, port = attacker.addresses[0].rpartition(":")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as plain:
        for _ in range(3000):
            plain.sendto(random.randbytes(random.randrange(1, 1400)), (host, int(port)))
    for _ in range(3000):
        connection: Any = attacker.link._connection
        connection._connection.send_datagram(random.randbytes(random.randrange(1000)))
    for _ in range(20):
        pipe = await soon(attacker.link._connection.open())
        try:
            await pipe.write(random.randbytes(50_000))
            await soon(pipe.read())
        except LinkLost:
            await attacker.link_again()


async def test_members_connect_although_others_hold_all_handshakes(attacker: Attacker) -> None:
    """Who say nothing once they are connected."""
    strangers = [await IrohTransport.bind(new_identity(), "127.0.0.1", 0) for _ in range(4)]

    async def stand(stranger: IrohTransport) -> Any:
        try:
            return await stranger.dial(attacker.server, attacker.addresses)
        except PeeringError as error:
            return error

    silent = await soon(asyncio.gather(*(stand(one) for one in strangers for _ in range(12))))
    assert len([one for one in silent if not isinstance(one, PeeringError)]) >= 32
    await asyncio.sleep(1.1)
    await attacker.link_again()
    for one in strangers:
        await one.close()
