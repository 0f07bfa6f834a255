"""Boxes that give each other made-up model files; `tests.support.model_copies SOURCE TARGET
DIGEST` is a copy in a process of its own, slow enough to be killed in the middle.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from pinaivu_box.config import Config
from pinaivu_box.errors import PeeringError
from pinaivu_box.files import download
from pinaivu_box.files import wire as file_wire
from pinaivu_box.files.download import Download, DownloadSource
from pinaivu_box.files.store import Digests
from pinaivu_box.files.upload import FileServer
from pinaivu_box.files.wire import PieceData
from pinaivu_box.models import catalog_loader
from pinaivu_box.models.catalog import Catalog
from pinaivu_box.models.header_reader import HeaderReader
from pinaivu_box.models.partial_file import PIECE_BYTES
from pinaivu_box.store.database import Database
from pinaivu_box.tasks import TaskSet
from pinaivu_box.transport import wire
from pinaivu_box.transport.link import Link, Stream
from tests.support import gguf_files
from tests.support.keys import new_identity
from tests.support.memory_transport import MemoryNetwork, MemoryTransport
from tests.support.waiting import soon

SIZE = 9 * PIECE_BYTES + 12_345
NAME = "made:up"


def made_up(seed: int, size: int = SIZE) -> bytes:
    """So many bytes that begin like a model."""
    head = gguf_files.aligned(gguf_files.header(tensors=[gguf_files.tensor("a", 1)]))
    return head + random.Random(seed).randbytes(size - len(head))


def digest_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class SharingBox:
    """A box with models, and what it does with whoever opens a stream."""

    def __init__(self, home: Path, name: str, kind: type[FileServer] = FileServer) -> None:
        self.folder = home / name / "models"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.name = name
        self.kind = kind
        self.shares, self.rate = True, 0.0
        self.headers = HeaderReader()
        self.links: list[Link] = []
        self._tasks = TaskSet()

    async def start(self, network: MemoryNetwork) -> None:
        self.database = Database(self.folder.parent / "pinaivu.db")
        await self.database.open()
        self.digests = Digests(self.database)
        self.sharing = self.kind(self.shared, self.digests, lambda: self.rate)
        self.transport = MemoryTransport(network, new_identity().node_id)
        self.source = DownloadSource(self.transport.node_id, self.name)
        self._tasks.spawn(self._accept())

    async def shared(self, _peer: str) -> Catalog | str:
        if not self.shares:
            return "this box does not share its models with yours"
        return catalog_loader.load(Config(), self.folder.parent, self.headers)

    async def _accept(self) -> None:
        with suppress(PeeringError):
            while True:
                link = await self.transport.accept()
                self.links.append(link)
                self._tasks.spawn(self._serve(link))

    async def _serve(self, link: Link) -> None:
        with suppress(PeeringError):
            while True:
                self._tasks.spawn(self._talk(link, await link.accept()))

    async def _talk(self, link: Link, stream: Stream) -> None:
        with suppress(PeeringError):
            await self.sharing.serve(link.peer, stream)

    async def leave(self) -> None:
        await self.transport.close()

    async def end(self) -> None:
        await self.transport.close()
        await self._tasks.cancel()
        self.headers.stop()
        await self.digests.close()
        await self.database.close()


class CopyNetwork:
    """Some givers and a box that takes; `open` as the network's, without the frame before."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.network = MemoryNetwork()
        self.ours = MemoryTransport(self.network, new_identity().node_id)
        self.givers: list[SharingBox] = []
        self.target = home / "ours" / "models" / f"{NAME}.gguf"
        self._links: dict[str, Link] = {}

    async def giver(
        self, data: bytes | None, kind: type[FileServer] = FileServer, name: str = ""
    ) -> SharingBox:
        made = SharingBox(self.home, name or f"box{len(self.givers) + 1}", kind)
        if data is not None:
            (made.folder / f"{NAME}.gguf").write_bytes(data)
        await made.start(self.network)
        self.givers.append(made)
        return made

    @property
    def sources(self) -> list[DownloadSource]:
        return [giver.source for giver in self.givers]

    async def open(self, peer: str) -> Stream:
        if peer not in self._links:
            addresses = next(
                giver.transport.addresses()
                for giver in self.givers
                if giver.transport.node_id == peer
            )
            self._links[peer] = await self.ours.connect(peer, addresses, 5)
        try:
            return await self._links[peer].open()
        except PeeringError:
            del self._links[peer]
            raise

    async def find(self, model: str = NAME, digest: str = "") -> dict[DownloadSource, Any]:
        return (await download.find(self.open, self.sources, model, digest))[0]

    async def copy(self, digest: str = "") -> Download:
        made = Download(self.open, await self.find(digest=digest), self.target.parent, NAME)
        await made.run()
        return made

    @property
    def partial(self) -> Path:
        folder = self.target.parent / ".partial"
        (found,) = [path for path in folder.iterdir() if path.suffix != ".lock"]
        return found

    async def end(self) -> None:
        await self.ours.close()
        for giver in self.givers:
            await giver.end()


class WrongPieces(FileServer):
    """Has the right list, and gives something else."""

    async def _send_piece(self, conversation: Any, model: Any, number: int) -> None:
        for _ in range(PIECE_BYTES // file_wire.MAX_DATA_BYTES):
            await conversation.send(PieceData(os.urandom(file_wire.MAX_DATA_BYTES)))


def read_answer(frame: bytes | None) -> file_wire.Answer:
    """What a box with model files answers."""
    return wire.decode(frame or b"", file_wire.answers)


async def asked(world: CopyNetwork, *questions: Any) -> Any:
    stream = await soon(world.open(world.sources[0].peer))
    for question in questions:
        await stream.send(wire.encode(question))
        answer = read_answer(await soon(stream.receive()))
    return answer


class Slow(FileServer):
    async def _send_piece(self, conversation: Any, model: Any, number: int) -> None:
        await asyncio.sleep(0.1)
        await super()._send_piece(conversation, model, number)


async def main(source: str, home: str, digest: str) -> None:
    world = CopyNetwork(Path(home))
    giver = SharingBox(Path(source), "source", Slow)
    await giver.start(world.network)
    world.givers.append(giver)
    await world.copy(digest)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
