"""Copies of models in several files: all of them or none, checked by one digest."""

from __future__ import annotations

import random
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pinaivu_box.config import Config
from pinaivu_box.errors import CopyFailed
from pinaivu_box.files import download
from pinaivu_box.files import wire as file_wire
from pinaivu_box.files.download import Download
from pinaivu_box.files.upload import FileServer
from pinaivu_box.files.wire import File, FileRefused, Find, GivePiece, List, ModelAvailable
from pinaivu_box.models import catalog as catalogs
from pinaivu_box.models import catalog_loader, partial_file
from pinaivu_box.models.partial_file import PIECE_BYTES
from pinaivu_box.models.splits import digest_of_parts
from pinaivu_box.transport import wire
from tests.support import gguf_files
from tests.support.model_copies import NAME, CopyNetwork, SharingBox, WrongPieces, asked, digest_of
from tests.support.waiting import soon, wait_until

pytestmark = pytest.mark.anyio
COUNT = 3
PARTS = [
    gguf_files.part(number, COUNT, tensors=COUNT)
    + random.Random(number).randbytes((2 if number == 2 else 0) * PIECE_BYTES + 1000)
    for number in range(1, COUNT + 1)
]
DIGESTS = [digest_of(data) for data in PARTS]
DIGEST = digest_of_parts(DIGESTS)
SIZES = [len(data) for data in PARTS]
SIZE = sum(SIZES)


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[CopyNetwork]:
    made = CopyNetwork(tmp_path)
    yield made
    await made.end()


async def giver(
    world: CopyNetwork, kind: type[FileServer] = FileServer, name: str = ""
) -> SharingBox:
    made = await world.giver(None, kind, name)
    gguf_files.put_split(made.folder, NAME, PARTS)
    return made


def folder(world: CopyNetwork) -> Path:
    return world.target.parent


def targets(world: CopyNetwork) -> list[Path]:
    return [
        folder(world) / gguf_files.part_name(NAME, number, COUNT) for number in range(1, COUNT + 1)
    ]


def there(world: CopyNetwork) -> list[str]:
    """Digests of what has come."""
    return [digest_of(path.read_bytes()) for path in targets(world)]


async def begun(world: CopyNetwork) -> Download:
    return Download(world.open, await world.find(), folder(world), NAME)


async def copied(world: CopyNetwork) -> Download:
    made = await begun(world)
    await made.run()
    return made


async def test_all_parts_come_from_two_boxes_and_are_one_model(world: CopyNetwork) -> None:
    one, other = await giver(world), await giver(world)
    done = await soon(copied(world))
    assert (done.digest, done.size, done.bytes) == (DIGEST, SIZE, SIZE)
    assert sum(done.sent.values()) == SIZE and not done.left_out
    assert done.sent[one.source] > 0 and done.sent[other.source] > 0
    assert there(world) == DIGESTS
    assert [(path, digest) for path, digest, _ in done.files] == list(
        zip(targets(world), DIGESTS, strict=True)
    )
    assert list((folder(world) / ".partial").iterdir()) == []
    model = catalog_loader.load(Config(), folder(world).parent).find(NAME)
    assert (model.size, len(model.parts)) == (SIZE, COUNT)
    assert catalogs.digest_of(model) == DIGEST


class Dies(FileServer):
    """Gives the first part, the first piece of the second, and then its box is gone."""

    giver: SharingBox

    async def _send_piece(self, conversation: Any, model: Any, number: int) -> None:
        if model.size == SIZES[1] and number > 0:
            path = self.giver.folder.parent.parent / "ours" / "models" / ".partial" / DIGESTS[1]
            await wait_until(lambda: path.stat().st_blocks * 512 >= PIECE_BYTES)
            await self.giver.leave()
        await super()._send_piece(conversation, model, number)


async def test_an_interrupted_copy_goes_on_in_the_middle_of_a_part(world: CopyNetwork) -> None:
    dying = await giver(world, Dies)
    dying.sharing.giver = dying  # type: ignore[attr-defined]
    with pytest.raises(CopyFailed, match=r"No source is left|stopped at"):
        await soon(copied(world))
    # Until all are here, none is in the folder.
    assert not any(path.exists() for path in targets(world))
    world.givers.remove(dying)
    await dying.end()
    await giver(world, name="again")
    done = await soon(copied(world))
    assert sum(done.sent.values()) == SIZE - SIZES[0] - PIECE_BYTES
    assert there(world) == DIGESTS


async def test_a_copy_that_was_killed_while_it_gave_names(world: CopyNetwork) -> None:
    await giver(world)
    folder(world).mkdir(parents=True)
    targets(world)[0].write_bytes(PARTS[0])
    done = await soon(copied(world))
    assert sum(done.sent.values()) == SIZE - SIZES[0]
    assert there(world) == DIGESTS


async def test_a_file_that_is_another_is_not_written_over(world: CopyNetwork) -> None:
    await giver(world)
    folder(world).mkdir(parents=True)
    targets(world)[2].write_bytes(b"mine")
    with pytest.raises(CopyFailed, match=r"00003-of-00003.gguf exists already.*--as"):
        await soon(copied(world))
    assert targets(world)[2].read_bytes() == b"mine" and not targets(world)[0].exists()
    assert not any((folder(world) / ".partial").iterdir())  # nothing was asked for


async def test_room_for_all_is_looked_for_before_anything_is_asked(
    world: CopyNetwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    await giver(world)
    usage = type("Usage", (), {"free": 100_000_000 + SIZE - 1})
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(CopyFailed, match="no room for the model"):
        await soon(copied(world))
    assert list((folder(world) / ".partial").iterdir()) == []


async def test_one_copy_at_a_time(world: CopyNetwork) -> None:
    await giver(world)
    with partial_file.claimed(folder(world), DIGEST), pytest.raises(CopyFailed, match="already"):
        await soon(copied(world))
    await soon(copied(world))


class SaysOneFile(FileServer):
    """Its answer is that of a box which has one file with that digest."""

    async def _parts(self, model: Any) -> tuple[File, ...]:
        return ()


class OtherParts(FileServer):
    async def _parts(self, model: Any) -> tuple[File, ...]:
        return tuple(File(digest_of(b"%d" % number), SIZE // COUNT) for number in range(COUNT))


@pytest.mark.parametrize("kind", [SaysOneFile, OtherParts, WrongPieces])
async def test_a_source_with_wrong_parts_is_left_out(
    world: CopyNetwork, kind: type[FileServer]
) -> None:
    await giver(world, kind, "eve")
    await giver(world, name="anna")
    found, without = await download.find(world.open, world.sources, NAME, "")
    copy = Download(world.open, found, folder(world), NAME)
    await soon(copy.run())
    assert there(world) == DIGESTS
    named = {source.name for source in {**without, **copy.left_out}}
    assert named == {"eve"}


async def test_no_other_box_is_asked_when_the_only_source_sends_wrong_data(
    world: CopyNetwork,
) -> None:
    await giver(world, OtherParts, "eve")
    with pytest.raises(CopyFailed, match="eve: the files that it offers are not those"):
        await soon(begun(world))
    assert not folder(world).exists()


# -- boxes of before -------------------------------------------------------------------------------


class OldFind(msgspec.Struct, frozen=True, tag="Find"):
    model: str
    digest: str


class OldHave(msgspec.Struct, frozen=True, tag="Have"):
    model: str
    digest: str
    size: int


async def test_a_box_that_knows_of_no_parts_hears_why_it_gets_none(world: CopyNetwork) -> None:
    await giver(world)
    for question in (OldFind(NAME, ""), OldFind(NAME, DIGEST)):
        refused = await asked(world, question)
        assert isinstance(refused, FileRefused)
        assert "is in 3 files, which your version" in refused.message
    assert isinstance(await asked(world, Find(NAME, "", parts=True)), ModelAvailable)
    # The digest of the whole is that of no file.
    for other in (List(DIGEST), GivePiece(DIGEST, 0)):
        assert isinstance(await asked(world, other), FileRefused)
    # In one file it is what it was: they read our answer, and we theirs.
    single = gguf_files.valid()
    (world.givers[0].folder / "single.gguf").write_bytes(single)
    have = await asked(world, OldFind("single", ""))
    assert have == ModelAvailable("single", digest_of(single), len(single))
    old = msgspec.msgpack.Decoder(OldHave).decode(wire.encode(have))
    assert old == OldHave("single", digest_of(single), len(single))
    assert wire.decode(wire.encode(old), file_wire.answers) == have
    old_question = msgspec.msgpack.Decoder(OldFind).decode(wire.encode(Find("m", "", parts=True)))
    assert old_question == OldFind("m", "")
