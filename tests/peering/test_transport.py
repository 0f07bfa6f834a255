"""Links: one contract, kept in memory and over iroh between two processes."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import pytest

from pinaivu_box.errors import LinkLost, ProtocolError, Unreachable, WrongPeer
from pinaivu_box.transport import transport as transports
from pinaivu_box.transport import wire
from pinaivu_box.transport.link import Connection, Link, Stream
from pinaivu_box.transport.wire import LENGTH, MAX_FRAME_BYTES, MAX_STREAMS, Code, Hello
from tests.support.keys import new_identity
from tests.support.transport_peers import IrohPair, MemoryPair, converse, echo
from tests.support.waiting import DEADLINE, soon, wait_until

pytestmark = pytest.mark.anyio
World = IrohPair | MemoryPair
MIB = 1024 * 1024
HELLO = Hello(versions=(1,), software="test", clock=0.0)


@pytest.fixture(scope="module", autouse=True)
def no_peer_is_left() -> Iterator[None]:
    yield
    IrohPair.end_all()


@pytest.fixture(params=[MemoryPair, IrohPair], ids=lambda world: world.__name__)
async def world(request: pytest.FixtureRequest) -> AsyncIterator[World]:
    made: World = request.param()
    await made.start()
    yield made
    await made.end()


@pytest.fixture
async def link(world: World) -> Link:
    return await world.connect()


# -- conversations -------------------------------------------------------------------------------


async def test_both_sides_know_each_other(world: World, link: Link) -> None:
    assert link.peer == world.node_id
    assert (await world.event("link"))["peer"] == world.ours.node_id
    assert link.version == 1
    assert link.software
    assert abs(link.clock_ahead) < DEADLINE
    assert link.route().direct
    assert link.route().address in world.addresses


async def test_frames_of_any_size_come_back_whole_and_in_order(link: Link) -> None:
    stream = await converse(link, "echo")
    frames = [bytes([size % 251]) * size for size in (1, 2, 3, 4, 5, 1000, 65535, MAX_FRAME_BYTES)]
    for frame in frames:
        await stream.send(frame)
        assert await soon(stream.receive()) == frame
    for frame in frames[:6] * 50:
        await stream.send(frame)
    await stream.finish()
    assert [await soon(stream.receive()) for _ in range(300)] == frames[:6] * 50
    assert await soon(stream.receive()) is None
    assert await soon(stream.receive()) is None


async def test_64_streams_at_once_do_not_mix(link: Link) -> None:
    async def talk(number: int) -> None:
        stream = await converse(link, "echo")
        for turn in range(20):
            await stream.send(f"{number} {turn}".encode())
            assert await soon(stream.receive()) == f"{number} {turn}".encode()
        await stream.finish()
        assert await soon(stream.receive()) is None

    await asyncio.gather(*[talk(number) for number in range(64)])


def streams_in_memory() -> int:
    gc.collect()
    return sum(isinstance(one, Stream) for one in gc.get_objects())


async def test_1000_streams_one_after_another_leave_nothing(link: Link) -> None:
    await echo(link)
    before = streams_in_memory()
    for _ in range(1000):  # more than may be open at a time
        await echo(link)
    assert streams_in_memory() <= before + 10


async def test_abandoned_streams_leave_nothing(link: Link) -> None:
    for number in range(MAX_STREAMS * 2):
        stream = await converse(link, "echo")
        if number % 2:
            await stream.send(b"hello")
            await soon(stream.receive())
        stream.abandon()
    await echo(link)


async def test_50_megabytes_arrive_unharmed_both_ways(link: Link) -> None:
    async def upload() -> None:
        stream = await converse(link, "sink")
        digest = hashlib.sha256()
        for number in range(50):
            frame = number.to_bytes(4, "big") * (MIB // 4)
            digest.update(frame)
            await stream.send(frame)
        await stream.finish()
        frame = await soon(stream.receive())
        assert json.loads(frame) == [50 * MIB, digest.hexdigest()]
        assert await soon(stream.receive()) is None

    async def download() -> None:
        stream = await converse(link, "source 50")
        for number in range(50):
            assert await soon(stream.receive()) == number.to_bytes(4, "big") * (MIB // 4)
        assert await soon(stream.receive()) is None
        await stream.finish()

    await asyncio.gather(upload(), download())


async def test_the_peer_opens_streams_as_well(link: Link) -> None:
    asking = await converse(link, "call_back 3")
    for number in range(3):
        back = await soon(link.accept())
        assert await soon(back.receive()) == str(number).encode()
        assert await soon(back.receive()) is None
        await back.finish()
    assert await soon(asking.receive()) is None
    await asking.finish()


async def test_a_link_lives_as_long_as_a_stream_of_it_is_used(world: World) -> None:
    stream = await converse(await world.connect(), "echo")  # nobody holds the link
    for turn in range(20):
        gc.collect()
        await stream.send(str(turn).encode())
        assert await soon(stream.receive()) == str(turn).encode()
    stream.abandon()


# -- bounds --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, MAX_FRAME_BYTES + 1])
async def test_a_frame_that_is_none_is_refused_and_the_stream_goes_on(
    link: Link, size: int
) -> None:
    stream = await converse(link, "echo")
    with pytest.raises(ValueError, match="a frame has 1 to 1048576 bytes"):
        await stream.send(bytes(size))
    await stream.send(b"still here")
    assert await soon(stream.receive()) == b"still here"
    stream.abandon()


async def test_a_peer_opens_so_many_streams_and_no_more(link: Link) -> None:
    opening = [asyncio.create_task(converse(link, "echo")) for _ in range(MAX_STREAMS + 50)]
    most, least = MAX_STREAMS, MAX_STREAMS * 7 // 8
    await wait_until(lambda: sum(one.done() for one in opening) >= least)
    streams = [one.result() for one in opening if one.done()]
    for stream in streams:  # all have been accepted, and go on
        await stream.send(b"hello")
        assert await soon(stream.receive()) == b"hello"
    assert least <= sum(one.done() for one in opening) <= most
    for stream in streams:
        await stream.finish()
        assert await soon(stream.receive()) is None
    for stream in await soon(asyncio.gather(*opening)):
        stream.abandon()


async def test_a_stream_that_is_not_read_blocks_its_own_sender_only(
    world: World, link: Link
) -> None:
    """Also the heartbeats go on when all that a link may hold is full."""
    sent = 0

    async def flood() -> None:
        nonlocal sent
        stream = await converse(link, "stall")
        while True:
            await stream.send(bytes(MIB // 2))
            sent += MIB // 2

    floods = [asyncio.create_task(flood()) for _ in range(64)]
    await asyncio.sleep(1.5 * world.patience)
    await echo(link)
    assert 0 < sent <= 64 * 2 * MIB
    for task in floods:
        task.cancel()
    await asyncio.gather(*floods, return_exceptions=True)
    await echo(link)


# -- endings -------------------------------------------------------------------------------------


async def test_a_stream_that_is_left_is_not_taken_for_a_finished_one(link: Link) -> None:
    stream = await converse(link, "leave")
    await stream.send(b"the only one")
    assert await soon(stream.receive()) == b"the only one"
    await stream.send(b"read")
    with pytest.raises(LinkLost, match="abandoned the stream"):
        await soon(stream.receive())
    with pytest.raises(LinkLost):
        await soon(stream.receive())
    with pytest.raises(LinkLost):
        await stream.send(b"anybody?")
    await echo(link)


async def test_the_peer_sees_that_we_left(world: World, link: Link) -> None:
    stream = await converse(link, "echo")
    await stream.send(b"hello")
    await soon(stream.receive())
    reading = asyncio.create_task(stream.receive())
    await asyncio.sleep(0)
    stream.abandon()
    seen = await world.event("stream")
    assert seen["kind"] == "LinkLost"
    assert "abandoned the stream" in seen["message"]
    with pytest.raises(LinkLost, match="This side abandoned"):
        await soon(reading)
    with pytest.raises(LinkLost, match="This side abandoned"):
        await stream.send(b"more")
    await echo(link)


async def test_bytes_that_end_without_an_end_frame_are_an_abandoned_stream(world: World) -> None:
    connection: Connection = await soon(world.ours.dial(world.node_id, world.addresses))
    await greeted(connection)
    pipe = await connection.open()
    await pipe.write(LENGTH.pack(4) + b"echo" + LENGTH.pack(100) + b"half")
    await pipe.finish()
    assert "abandoned the stream" in (await world.event("stream"))["message"]


async def test_a_cancelled_receive_or_accept_loses_nothing(link: Link) -> None:
    async def impatiently(what: Callable[[], Awaitable[Any]]) -> Any:
        while True:
            try:
                return await asyncio.wait_for(what(), 0.0005)
            except TimeoutError:
                continue

    stream = await converse(link, "echo")
    for number in range(200):
        await stream.send(str(number).encode())
        assert await soon(impatiently(stream.receive)) == str(number).encode()
    stream.abandon()
    asking = await converse(link, "call_back 50")
    for number in range(50):
        back = await soon(impatiently(link.accept))
        assert await soon(back.receive()) == str(number).encode()
        await back.finish()
        assert await soon(back.receive()) is None
    await asking.finish()


async def test_a_cancelled_send_abandons_the_stream(link: Link) -> None:
    stream = await converse(link, "stall")

    async def flood() -> None:
        while True:
            await stream.send(bytes(MAX_FRAME_BYTES))

    with pytest.raises(TimeoutError):
        await asyncio.wait_for(flood(), 1)
    with pytest.raises(LinkLost, match="This side abandoned"):
        await stream.send(b"the other half of a frame?")
    await echo(link)


@pytest.mark.parametrize("how", ["kill", "stop"])
async def test_a_dead_or_frozen_peer_is_noticed(world: World, link: Link, how: str) -> None:
    stream = await converse(link, "echo")
    await stream.send(b"hello")
    await soon(stream.receive())
    reading, accepting = asyncio.create_task(stream.receive()), asyncio.create_task(link.accept())
    getattr(world, how)()
    lost = await soon(link.closed())
    assert lost.code == Code.SILENT
    assert "nothing was heard from it for" in lost.message
    for waiting in (reading, accepting, link.open(), stream.send(b"hello")):
        with pytest.raises(LinkLost, match="nothing was heard"):
            await soon(waiting)


async def test_a_suspended_box_gets_the_reason_and_may_reconnect(world: World, link: Link) -> None:
    world.stop()
    await soon(link.closed())
    world.go_on()
    assert (await world.event("closed"))["message"]
    await echo(await soon(world.connect()))


async def test_an_idle_link_stays(world: World, link: Link) -> None:
    await asyncio.sleep(1.5 * world.patience)
    await echo(link)


async def test_a_link_without_a_reference_stays_until_the_transport_closes(world: World) -> None:
    await world.connect()
    for _ in range(3):
        gc.collect()
        await asyncio.sleep(0.5 * world.patience)
    await world.ours.close()
    assert (await world.event("closed"))["code"] == Code.SHUTDOWN


async def test_a_close_by_the_peer_has_its_code_and_reason(link: Link) -> None:
    stream = await converse(link, "close 403 you (of all boxes) are no member: ask é for a ticket")
    lost = await soon(link.closed())
    assert lost.code == Code.FORBIDDEN
    assert lost.reason == "you (of all boxes) are no member: ask é for a ticket"
    assert lost.reason in lost.message
    for failing in (stream.receive(), stream.send(b"x"), link.open(), link.accept()):
        with pytest.raises(LinkLost) as caught:
            await soon(failing)
        assert (caught.value.code, caught.value.reason) == (lost.code, lost.reason)


async def test_a_close_by_this_box_has_its_code_and_reason(world: World, link: Link) -> None:
    stream = await converse(link, "echo")
    await link.close(Code.FORBIDDEN, "ä" * 1000)
    assert await link.closed() is await link.closed()
    seen = await world.event("closed")
    assert (seen["code"], seen["reason"]) == (403, "ä" * 250)
    with pytest.raises(LinkLost, match="This box closed the link"):
        await stream.receive()


async def test_a_shutdown_closes_links_with_its_code(world: World, link: Link) -> None:
    await world.ours.close()
    assert (await world.event("closed"))["code"] == Code.SHUTDOWN
    assert (await link.closed()).code == Code.SHUTDOWN
    with pytest.raises(LinkLost, match="closed"):
        await world.ours.accept()


# -- who is there --------------------------------------------------------------------------------


async def test_no_server_at_the_address(world: World) -> None:
    with pytest.raises(Unreachable, match=r"did not answer at 127\.0\.0\.1:9 within"):
        await world.ours.connect(new_identity().node_id, ["127.0.0.1:9"], 0.5)
    with pytest.raises(Unreachable, match="no address"):
        await world.ours.connect(world.node_id, [], DEADLINE)
    with pytest.raises(Unreachable, match="this box itself"):
        await world.ours.connect(world.ours.node_id, world.addresses, DEADLINE)


async def test_another_server_at_the_address(world: World) -> None:
    with pytest.raises(WrongPeer, match="Another box than node_"):
        await world.ours.connect(new_identity().node_id, world.addresses, DEADLINE)
    await echo(await world.connect())


async def test_one_good_address_among_bad_ones_is_enough(world: World) -> None:
    link = await world.ours.connect(world.node_id, ["127.0.0.1:9", *world.addresses], DEADLINE)
    await echo(link)


async def test_an_unknown_version_is_refused_with_a_sentence(world: World) -> None:
    strange = await world.transport(versions=(98, 99))
    with pytest.raises(LinkLost) as caught:
        await strange.connect(world.node_id, world.addresses, DEADLINE)
    assert caught.value.code == Code.VERSION
    assert "this box speaks version 1 of the protocol" in caught.value.reason
    assert "yours 98, 99 of the protocol" in caught.value.reason
    assert "update the older of the two" in caught.value.message
    newer = await world.transport(versions=(1, 2))
    link = await newer.connect(world.node_id, world.addresses, DEADLINE)
    assert link.version == 1
    await echo(link)
    await strange.close()
    await newer.close()


async def test_the_clocks_difference_is_seen(world: World) -> None:
    behind = await world.transport(clock=lambda: 1000.0)
    link = await behind.connect(world.node_id, world.addresses, DEADLINE)
    assert link.clock_ahead > 1_000_000_000
    await behind.close()


# -- garbage -------------------------------------------------------------------------------------


async def greeted(connection: Any) -> None:
    pipe = await connection.open()
    frame = wire.encode(HELLO)
    await pipe.write(LENGTH.pack(len(frame)) + frame + wire.END_FRAME)
    await pipe.finish()
    while await soon(pipe.read()):
        pass


NO_HELLO = "the first frame is not a Hello"
GARBAGE = {
    "2 GB announced": (b"\xff\xff\xff\x7f", "a frame of 2147483647 bytes was announced"),
    "HTTP": (b"GET / HTTP/1.1\r\n\r\n", "a frame of 542393671 bytes was announced"),
    "too long a Hello": (LENGTH.pack(wire.MAX_HELLO_BYTES + 1), "and 4096 are allowed"),
    "no msgpack": (LENGTH.pack(3) + b"\xc1\xc1\xc1", NO_HELLO),
    "another message": (LENGTH.pack(1) + b"\x80", NO_HELLO),
    "nested too deeply": (LENGTH.pack(4000) + b"\x91" * 4000, NO_HELLO),
    "only the end": (wire.END_FRAME, NO_HELLO),
}


@pytest.mark.parametrize("garbage", GARBAGE)
async def test_garbage_instead_of_a_hello_closes_the_link(world: World, garbage: str) -> None:
    sent, sentence = GARBAGE[garbage]
    connection: Connection = await soon(world.ours.dial(world.node_id, world.addresses))
    pipe = await connection.open()
    await pipe.write(sent)
    lost = await soon(connection.closed())
    assert lost.code == Code.PROTOCOL
    assert sentence in lost.reason
    await echo(await world.connect())


async def test_an_oversized_frame_closes_the_link(world: World) -> None:
    connection: Connection = await soon(world.ours.dial(world.node_id, world.addresses))
    await greeted(connection)
    pipe = await connection.open()
    await pipe.write(LENGTH.pack(4) + b"echo" + LENGTH.pack(MAX_FRAME_BYTES + 1))
    lost = await soon(connection.closed())
    assert lost.code == Code.PROTOCOL
    assert "a frame of 1048577 bytes was announced, and 1048576 are allowed" in lost.reason
    assert (await world.event("stream"))["kind"] == "ProtocolError"


async def test_a_silent_connection_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transports, "HANDSHAKE_SECONDS", 0.2)
    world = MemoryPair()
    await world.start()
    connection = await world.ours.dial(world.node_id, world.addresses)
    assert "the handshake took over" in (await soon(connection.closed())).reason
    await world.end()


async def test_a_connection_to_a_box_that_shuts_down_is_refused_with_a_reason() -> None:
    world = MemoryPair()
    await world.start()
    connection = await world.ours.dial(world.node_id, world.addresses)
    await asyncio.sleep(0)  # the greeting begins
    await world.end()
    lost = await soon(connection.closed())
    assert (lost.code, lost.reason) == (Code.SHUTDOWN, "the box is shutting down")


async def test_inbound_handshakes_are_limited() -> None:
    world = MemoryPair()
    await world.start()
    at_the_door = [await world.ours.dial(world.node_id, world.addresses) for _ in range(70)]
    still_open = [one.why is None for one in at_the_door]
    assert still_open.count(True) == transports.MAX_INBOUND_HANDSHAKES
    await world.end()


def test_a_frame_that_is_not_of_the_conversation_is_a_protocol_error() -> None:
    assert wire.decode_hello(wire.encode(HELLO)) == HELLO
    with pytest.raises(ProtocolError, match="a frame is not what was expected"):
        wire.decode_hello(b"\x93\x01\x02\x03")
