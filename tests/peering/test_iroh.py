"""What only links over iroh can show."""

from __future__ import annotations

import asyncio
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import iroh.iroh_ffi
import pytest

from pinaivu_box.errors import CliError, Unreachable
from pinaivu_box.transport import iroh_bindings
from pinaivu_box.transport.iroh_transport import IrohTransport
from pinaivu_box.transport.link import LinkOptions
from pinaivu_box.transport.wire import Code
from tests.support.keys import new_identity
from tests.support.ports import free_port
from tests.support.transport_peers import PeerProcess, converse, echo
from tests.support.waiting import DEADLINE, soon, wait_until

pytestmark = pytest.mark.anyio


@pytest.fixture
def peers() -> Iterator[Callable[..., PeerProcess]]:
    made: list[PeerProcess] = []

    def start(*args: str, **more: Any) -> PeerProcess:
        made.append(PeerProcess(*args, **more))
        return made[-1]

    yield start
    for one in made:
        one.end()


async def test_a_peer_that_starts_again_is_linked_to_again(
    peers: Callable[..., PeerProcess],
) -> None:
    port = free_port()
    first = peers(port=port)
    here = await first.event("listening")
    ours = await IrohTransport.bind(new_identity(), "127.0.0.1", 0)
    link = await ours.connect(here["node_id"], here["addresses"], DEADLINE)
    first.end()
    second = peers(seed=first.seed, port=port)
    await second.event("listening")
    assert (await soon(link.closed())).message
    again = await ours.connect(here["node_id"], here["addresses"], DEADLINE)
    await echo(again)
    await ours.close()


async def test_sigterm_closes_links_with_a_reason(peers: Callable[..., PeerProcess]) -> None:
    peer = peers()
    here = await peer.event("listening")
    ours = await IrohTransport.bind(new_identity(), "127.0.0.1", 0)
    link = await ours.connect(here["node_id"], here["addresses"], DEADLINE)
    peer.process.terminate()
    lost = await soon(link.closed())
    assert (lost.code, lost.reason) == (Code.SHUTDOWN, "the box is shutting down")
    assert peer.process.wait(DEADLINE) == 0
    await ours.close()


async def test_failures_to_bind_or_dial_say_why() -> None:
    ours = await IrohTransport.bind(new_identity(), "127.0.0.1", 0)
    port = int(ours.addresses()[0].rpartition(":")[2])
    with pytest.raises(CliError, match=f"cannot use UDP port {port} of 127.0.0.1"):
        await IrohTransport.bind(new_identity(), "127.0.0.1", port)
    with pytest.raises(CliError, match=r"cannot use UDP port 0 of 192\.0\.2\.77"):
        await IrohTransport.bind(new_identity(), "192.0.2.77", 0)
    for address in ("somewhere", "box.invalid:4002", "127.0.0.1:port"):
        with pytest.raises(Unreachable, match="no address to connect to"):
            await ours.connect(new_identity().node_id, [address], DEADLINE)
    for node_id in ("node_12", "node_" + "0" * 63 + "1", "somebody"):
        with pytest.raises(Unreachable, match="is not a node id"):
            await ours.connect(node_id, ["127.0.0.1:9"], DEADLINE)
    await ours.close()


async def test_names_are_looked_up(peers: Callable[..., PeerProcess]) -> None:
    here = await peers().event("listening")
    ours = await IrohTransport.bind(new_identity(), "127.0.0.1", 0)
    port = here["addresses"][0].rpartition(":")[2]
    await echo(await ours.connect(here["node_id"], [f"localhost:{port}"], DEADLINE))
    await ours.close()


def listening(pid: int) -> set[str]:
    """The addresses of a process's UDP sockets, as /proc has them."""
    sockets = set()
    for one in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed since it was listed
            sockets.add(str(one.readlink()))
    found = set()
    for table in ("udp", "udp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            if f"socket:[{words[9]}]" in sockets:
                found.add(words[1].partition(":")[0])
    return found


async def test_a_loopback_host_opens_nothing_else(peers: Callable[..., PeerProcess]) -> None:
    """But for the search for a router (UPnP), which is iroh's own, and soon ends."""
    peer = peers()
    await peer.event("listening")
    loopback = {"0100007F", "00000000000000000000000001000000"}
    await wait_until(lambda: listening(peer.process.pid) <= loopback)
    assert listening(peer.process.pid)


@pytest.mark.parametrize("relay", ["n0", "https://127.0.0.1:9/"])
async def test_an_unreachable_relay_does_not_hinder_links(
    peers: Callable[..., PeerProcess], relay: str
) -> None:
    here = await peers().event("listening")
    ours = await IrohTransport.bind(new_identity(), "127.0.0.1", 0, relay)
    await echo(await ours.connect(here["node_id"], here["addresses"], DEADLINE))
    await ours.close()


async def test_streams_that_are_collected_as_garbage_block_no_link(
    peers: Callable[..., PeerProcess],
) -> None:
    """Also if that happens in iroh's own thread, which has locks."""
    here = await peers().event("listening")
    ours = await IrohTransport.bind(new_identity(), "127.0.0.1", 0)
    link = await ours.connect(here["node_id"], here["addresses"], DEADLINE)

    async def talk() -> None:
        for _ in range(400):
            stream = await converse(link, "litter")
            for _ in range(3):
                await stream.send(b"hello")
                assert await soon(stream.receive()) == b"hello"
            await stream.finish()
            assert await soon(stream.receive()) is None

    await asyncio.gather(*[talk() for _ in range(8)])
    await ours.close()


async def test_a_peer_whose_program_stands_still_is_borne_for_a_while(
    peers: Callable[..., PeerProcess],
) -> None:
    here = await peers().event("listening")
    options = LinkOptions(beat_seconds=0.5, max_silent=4, max_stuck=10)
    ours = await IrohTransport.bind(new_identity(), "127.0.0.1", 0, options=options)
    link = await ours.connect(here["node_id"], here["addresses"], DEADLINE)
    stream = await converse(link, "block 3")
    assert await soon(stream.receive()) is None
    await echo(link)
    await converse(link, "block 3600")
    lost = await soon(link.closed())
    assert lost.code == Code.SILENT
    assert "its machine answers, but not its program" in lost.reason
    await ours.close()


async def test_a_box_that_was_suspended_reports_no_box_as_gone(
    peers: Callable[..., PeerProcess],
) -> None:
    here = await peers().event("listening")
    options = LinkOptions(beat_seconds=0.2, max_silent=2)
    ours = await IrohTransport.bind(new_identity(), "127.0.0.1", 0, options=options)
    link = await ours.connect(here["node_id"], here["addresses"], DEADLINE)
    time.sleep(2)  # noqa: ASYNC251
    await echo(link)
    await ours.close()


async def test_bindings_that_are_not_those_we_know_stay_as_they_are() -> None:
    known = vars(iroh.iroh_ffi._UniffiFfiConverterBytes)["lower"]
    assert isinstance(known, staticmethod)  # ours: the fix is applied, and this suite runs on it

    def bindings(**more: Any) -> Any:
        stock = type("Bytes", (), {"lower": "stock"})
        names = {"_UniffiFfiConverterBytes": stock, "_UniffiRustBuffer": _buffers()}
        return SimpleNamespace(**{**names, **more})

    good = bindings()
    assert iroh_bindings.fix_copying(good)
    made = good._UniffiFfiConverterBytes.lower(b"abc" * 1000)
    assert made.data[: made.len] == (3000).to_bytes(4, "big") + b"abc" * 1000
    made.free()
    strange_fields = type("Buffer", (), {"_fields_": [("len", int)]})
    for ffi, version in (
        (bindings(), "1.2.1"),
        (bindings(_UniffiRustBuffer=None), None),
        (bindings(_UniffiRustBuffer=strange_fields), None),
        (bindings(_UniffiFfiConverterBytes=None), None),
    ):
        assert not iroh_bindings.fix_copying(ffi, version)
        assert getattr(ffi._UniffiFfiConverterBytes, "lower", "stock") == "stock"


def _buffers() -> Any:
    return iroh.iroh_ffi._UniffiRustBuffer


# -- another machine -----------------------------------------------------------------------------


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture
def two_machines() -> Iterator[tuple[str, str]]:
    """Two network namespaces with a cable between: 10.77.0.1 and 10.77.0.2."""
    names = (f"pnv-a-{os.getpid()}", f"pnv-b-{os.getpid()}")
    try:
        for name in names:
            ip("netns", "add", name)
        ip(
            "link",
            "add",
            "eth0",
            "netns",
            names[0],
            "type",
            "veth",
            "peer",
            "eth0",
            "netns",
            names[1],
        )
        for number, name in enumerate(names, 1):
            ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                ip("-n", name, "link", "set", device, "up")
        yield names
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("network namespaces are not permitted here")
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


async def test_two_machines_and_the_cable_pulled_out(
    two_machines: tuple[str, str], peers: Callable[..., PeerProcess]
) -> None:
    here, there = (["ip", "netns", "exec", name] for name in two_machines)
    first = peers("0.0.0.0", prefix=here)
    listening = await first.event("listening")
    address = next(one for one in listening["addresses"] if one.startswith("10.77.0.1:"))
    assert not any(one.startswith("127.") for one in listening["addresses"])
    second = peers("0.0.0.0", listening["node_id"], address, prefix=there)
    echoed = await second.event("echoed")
    assert (echoed["text"], echoed["route"]) == ("hello", address)
    assert (await first.event("link"))["peer"]
    ip("-n", two_machines[0], "link", "set", "eth0", "down")
    for peer in (first, second):
        assert (await peer.event("closed"))["code"] == Code.SILENT
