"""Conversations of every kind leave no stream open, whichever side stops reading, over both
transports: else a link comes to the number of streams that it may have open, and stands still.

All streams are kept by the tests, so that no garbage collector ends them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import pytest
from msgspec import Struct, msgpack

from pinaivu_box.errors import CopyFailed, PeerRefused
from pinaivu_box.files import download
from pinaivu_box.files import wire as file_wire
from pinaivu_box.files.download import DownloadSource
from pinaivu_box.identity import Identity
from pinaivu_box.ledger.session import PURPOSE as LEDGER
from pinaivu_box.ledger.session import Ledger
from pinaivu_box.membership import joining
from pinaivu_box.membership.joining import JoinHandler
from pinaivu_box.membership.store import MembershipStore
from pinaivu_box.membership.tickets import Ticket
from pinaivu_box.store.database import Database
from pinaivu_box.tasks import TaskSet
from pinaivu_box.transport.iroh_transport import IrohTransport
from pinaivu_box.transport.link import Link, LinkOptions, Stream
from pinaivu_box.transport.rpc import MessageStream
from pinaivu_box.transport.streams import StreamHandler, StreamRouter
from pinaivu_box.transport.transport import Transport
from pinaivu_box.transport.wire import MAX_STREAMS, Code, Open
from pinaivu_box.witness import wire as log_wire
from pinaivu_box.witness.peers import LogServer
from pinaivu_box.witness.questions import Questions
from tests.support.keys import IDENTITIES
from tests.support.memory_transport import MemoryNetwork, MemoryTransport
from tests.support.model_copies import NAME, SharingBox, made_up
from tests.support.waiting import DEADLINE, soon

pytestmark = pytest.mark.anyio
A, B = IDENTITIES[:2]
COUNT = MAX_STREAMS + MAX_STREAMS // 8
OPTIONS = LinkOptions(beat_seconds=1.0, max_silent=60, max_stuck=120)


class Word(Struct, tag=True):
    text: str


WORDS: msgpack.Decoder[Word] = msgpack.Decoder(Word)


class TwoBoxes:
    """A asks over `link`, B answers as `handlers` say; both keep every stream."""

    def __init__(self, home: Path, kind: str) -> None:
        self.home, self.kind = home, kind
        self.kept: list[Stream] = []
        self.handlers: dict[str, StreamHandler] = {}
        self._tasks = TaskSet()

    async def start(self) -> None:
        network = MemoryNetwork()

        async def bind(identity: Identity) -> Transport:
            if self.kind == "memory":
                return MemoryTransport(network, identity.node_id, OPTIONS)
            return await IrohTransport.bind(identity, "127.0.0.1", 0, options=OPTIONS)

        self._ours, self._theirs = [await bind(who) for who in (A, B)]
        self.a, self.b = (Database(self.home / f"{name}.db") for name in ("a", "b"))
        await self.a.open()
        await self.b.open()
        addresses = self._theirs.addresses()
        self.link, back = await asyncio.gather(
            self._ours.connect(B.node_id, addresses, DEADLINE), self._theirs.accept()
        )
        self._tasks.spawn(self._serve(back))

    async def _serve(self, link: Link) -> None:
        async def all_are_members(_: str) -> None:
            return None

        router = StreamRouter({}, self.handlers, all_are_members)
        with suppress(Exception):
            while True:
                stream = await link.accept()
                self.kept.append(stream)
                self._tasks.spawn(router.handle(stream))

    async def open(self, purpose: str) -> Stream:
        stream: Stream = await soon(self.link.open(Open(purpose)))
        self.kept.append(stream)
        return stream

    async def has_room(self) -> None:
        """All streams that a link may have can be opened at once, or a few less."""
        more = [await self.open("nothing") for _ in range(MAX_STREAMS - MAX_STREAMS // 8)]
        for stream in more:
            stream.abandon()

    async def end(self) -> None:
        await self._ours.close()
        await self._theirs.close()
        await self._tasks.cancel()
        await self.a.close()
        await self.b.close()


@pytest.fixture(params=["memory", "iroh"])
async def boxes(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[TwoBoxes]:
    made = TwoBoxes(tmp_path, request.param)
    await made.start()
    yield made
    await made.end()


async def repeat(boxes: TwoBoxes, conversation: Callable[[], Awaitable[Any]]) -> None:
    for _ in range(COUNT):
        await soon(conversation())
    await boxes.has_room()


# -- the kinds of conversations ------------------------------------------------------------------


async def test_of_the_ledger(boxes: TwoBoxes) -> None:
    boxes.handlers[LEDGER] = Ledger(B, boxes.b).handle
    ledger = Ledger(A, boxes.a)

    async def settle() -> None:
        await ledger.settle(B.node_id, await boxes.open(LEDGER))

    await repeat(boxes, settle)


async def test_about_logs(boxes: TwoBoxes) -> None:
    class Nothing:
        def known_of(self, node: str) -> tuple[str, ...]:
            return ()

    server = LogServer(cast(Any, None), cast(Any, Nothing()), cast(Any, None))
    boxes.handlers[log_wire.PURPOSE] = server.serve

    class Network:
        async def open(self, peer: str, purpose: str, timeout: float = 0.0) -> Stream:
            return await boxes.open(purpose)

    questions = Questions(cast(Any, Network()))

    async def ask() -> None:  # some are answered, and the rest told that they are too many
        await questions.ask(B.node_id, log_wire.AskKnown(A.node_id), log_wire.Known)

    await repeat(boxes, ask)


@pytest.fixture
async def sharing(boxes: TwoBoxes, tmp_path: Path) -> AsyncIterator[SharingBox]:
    box = SharingBox(tmp_path, "giver")
    (box.folder / f"{NAME}.gguf").write_bytes(made_up(1, 2_000_000))
    await box.start(MemoryNetwork())
    boxes.handlers[file_wire.PURPOSE] = box.sharing.serve
    yield box
    await box.end()


@pytest.mark.parametrize("shares", [True, False])
async def test_that_find_a_model(boxes: TwoBoxes, sharing: SharingBox, shares: bool) -> None:
    sharing.shares = shares
    source = DownloadSource(B.node_id, "b")

    async def find() -> None:
        found = download.find(lambda _: boxes.open(file_wire.PURPOSE), [source], NAME, "")
        if shares:
            await found
        else:
            with pytest.raises(CopyFailed):
                await found

    await repeat(boxes, find)


async def test_that_are_cancelled_in_the_middle_of_a_piece(
    boxes: TwoBoxes, sharing: SharingBox
) -> None:
    source = DownloadSource(B.node_id, "b")
    offers, _ = await soon(
        download.find(lambda _: boxes.open(file_wire.PURPOSE), [source], NAME, "")
    )
    digest = offers[source].digest

    async def cancelled() -> None:
        stream = await boxes.open(file_wire.PURPOSE)
        conversation: MessageStream[Any, Any] = MessageStream(
            B.node_id, stream, file_wire.answers, receive_seconds=DEADLINE
        )
        begun = asyncio.Event()

        async def read() -> None:
            async with conversation:
                await conversation.call(file_wire.GivePiece(digest, 0), file_wire.PieceData)
                begun.set()
                await asyncio.Event().wait()

        reading = asyncio.create_task(read())
        await soon(begun.wait())
        reading.cancel()
        await asyncio.wait([reading])

    await repeat(boxes, cancelled)


async def test_of_newcomers_that_are_refused(boxes: TwoBoxes) -> None:
    handler = JoinHandler(B, MembershipStore(boxes.b), boxes.b)
    await handler.found_network("b")

    async def handle(peer: str, stream: Stream) -> None:
        await handler.handle(peer, stream)

    boxes.handlers[joining.PURPOSE] = handle
    key = bytes.fromhex(B.node_id.removeprefix("node_"))
    unknown = Ticket(key, b"n" * 36, b"x" * 16, int(time.time()) + 60, ())

    class OneLink:
        peer = B.node_id

        async def open(self, opening: Open) -> Stream:
            return await boxes.open(opening.purpose)

    async def join() -> None:
        with pytest.raises(PeerRefused) as refused:
            await joining._request_certificate(cast(Any, OneLink()), A.node_id, unknown, "a")
        assert refused.value.code == Code.FORBIDDEN

    await repeat(boxes, join)


async def test_for_an_unknown_purpose(boxes: TwoBoxes) -> None:
    async def ask() -> None:
        stream = await boxes.open("nothing")
        with pytest.raises(PeerRefused):
            await stream.receive()

    await repeat(boxes, ask)


# -- whoever stops reading -----------------------------------------------------------------------


def conversation(peer: str, stream: Stream) -> MessageStream[Word, Word]:
    return MessageStream(peer, stream, WORDS, receive_seconds=DEADLINE)


@pytest.mark.parametrize("asker_reads", [0, 1])
@pytest.mark.parametrize("server_reads", [0, 1])
async def test_neither_side_reads_to_the_end(
    boxes: TwoBoxes, asker_reads: int, server_reads: int
) -> None:
    async def serve(peer: str, stream: Stream) -> None:
        async with conversation(peer, stream) as words:
            await words.send(*[Word("from b")] * 3)
            for _ in range(server_reads):
                await words.receive()

    boxes.handlers["words"] = serve

    async def ask() -> None:
        async with conversation(B.node_id, await boxes.open("words")) as words:
            await words.send(*[Word("from a")] * 3)
            for _ in range(asker_reads):
                await words.receive()

    await repeat(boxes, ask)


async def test_a_handler_returns_and_has_ended_nothing(boxes: TwoBoxes) -> None:
    async def serve(_: str, stream: Stream) -> None:
        await stream.receive()

    boxes.handlers["words"] = serve

    async def ask() -> None:
        async with conversation(B.node_id, await boxes.open("words")) as words:
            await words.send(Word("from a"))

    await repeat(boxes, ask)
