"""Copies of model files between boxes: whole, checked, whoever lies, dies or is killed."""

from __future__ import annotations

import asyncio
import errno
import gc
import hashlib
import os
import random
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from pinaivu_box.errors import CopyFailed, LinkLost, ProtocolError
from pinaivu_box.files import download, upload
from pinaivu_box.files import wire as file_wire
from pinaivu_box.files.store import Digests
from pinaivu_box.files.upload import FileServer
from pinaivu_box.files.wire import (
    FileRefused,
    Find,
    GivePiece,
    List,
    ModelAvailable,
    PieceData,
    Working,
)
from pinaivu_box.models import partial_file
from pinaivu_box.models.partial_file import PIECE_BYTES
from pinaivu_box.transport import wire
from tests.support import tiny_vision
from tests.support.model_copies import (
    NAME,
    SIZE,
    CopyNetwork,
    SharingBox,
    WrongPieces,
    asked,
    digest_of,
    made_up,
    read_answer,
)
from tests.support.paths import ROOT
from tests.support.process_box import environment
from tests.support.waiting import soon, wait_until

pytestmark = pytest.mark.anyio
DATA = made_up(1)
DIGEST = digest_of(DATA)
COUNT = partial_file.count(SIZE)


@pytest.fixture
async def world(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> AsyncIterator[CopyNetwork]:
    """No task of it ends with an error that nobody asked for."""
    made = CopyNetwork(tmp_path)
    yield made
    await made.end()
    gc.collect()
    assert [one for one in caplog.get_records("call") if one.name == "asyncio"] == []
    assert [one for one in caplog.records if one.name == "asyncio"] == []


# -- how others behave -----------------------------------------------------------------------------


class WrongDigests(Digests):
    async def of(self, model: Any) -> str:
        return DIGEST


class AnotherFile(FileServer):
    """Says that its file is the one with the digest that is asked for, all through."""

    def __init__(self, shared: Any, digests: Any, rate: Any) -> None:
        super().__init__(shared, WrongDigests(digests._database), rate)


class TooMuch(FileServer):
    async def _send_piece(self, conversation: Any, model: Any, number: int) -> None:
        for _ in range(1 + PIECE_BYTES // file_wire.MAX_DATA_BYTES):
            await conversation.send(PieceData(b"\1" * (file_wire.MAX_DATA_BYTES - 1)))


class Garbage(FileServer):
    async def _send_piece(self, conversation: Any, model: Any, number: int) -> None:
        await conversation.stream.send(os.urandom(1000))


class Silent(FileServer):
    async def _send_piece(self, conversation: Any, model: Any, number: int) -> None:
        await asyncio.Event().wait()


class ShortHashes(Digests):
    async def hashes(self, model: Any, digest: str) -> bytes:
        return b"\1" * (32 * COUNT + 5)


class ShortList(FileServer):
    def __init__(self, shared: Any, digests: Any, rate: Any) -> None:
        super().__init__(shared, ShortHashes(digests._database), rate)


class Dies(FileServer):
    """Gives two pieces, and then its box is gone."""

    given = 0
    giver: SharingBox

    async def _send_piece(self, conversation: Any, model: Any, number: int) -> None:
        self.given += 1
        if self.given > 2:
            await self.giver.leave()
        await super()._send_piece(conversation, model, number)


# -- what is copied is what was asked for ----------------------------------------------------------


async def test_a_model_comes_whole_from_two_boxes_at_once(world: CopyNetwork) -> None:
    one, other = await world.giver(DATA), await world.giver(DATA)
    done = await soon(world.copy())
    assert digest_of(world.target.read_bytes()) == done.digest == DIGEST
    assert done.sent[one.source] > 0 and done.sent[other.source] > 0
    assert sum(done.sent.values()) == done.bytes == SIZE and not done.left_out
    assert done.files[0][2] == b"".join(
        hashlib.sha256(DATA[at : at + PIECE_BYTES]).digest() for at in range(0, SIZE, PIECE_BYTES)
    )
    assert list((world.target.parent / ".partial").iterdir()) == []


async def test_a_range_of_another_file_is_copied_like_a_file(
    world: CopyNetwork, tmp_path: Path
) -> None:
    """As the model inside the executable."""
    from pinaivu_box import appended
    from pinaivu_box.models import bundled

    gguf, executable = tmp_path / "inner.gguf", tmp_path / "executable"
    gguf.write_bytes(DATA)
    executable.write_bytes(b"\x7fELF" + os.urandom(100_000))
    appended.append(executable, appended.MODEL, gguf)
    where = bundled.read_footer(executable)
    giver = await world.giver(None)
    found = catalog_with(executable, where)

    async def shared(_peer: str) -> Any:
        return found

    giver.sharing = FileServer(shared, giver.digests)
    await soon(world.copy())
    assert digest_of(world.target.read_bytes()) == DIGEST


def catalog_with(path: Path, where: Any) -> Any:
    from pinaivu_box.models import catalog

    model = catalog.Model(
        NAME, path, where.offset, where.size, owner="bundled", recorded_digest=where.digest
    )
    return catalog.Catalog({NAME: model})


@pytest.mark.parametrize("size", [129, 130, PIECE_BYTES - 1, PIECE_BYTES, PIECE_BYTES + 1])
async def test_sizes_at_the_edges_of_pieces(world: CopyNetwork, size: int) -> None:
    data = made_up(2, size)
    await world.giver(data)
    await soon(world.copy())
    assert world.target.read_bytes() == data


async def test_different_files_under_one_name_must_be_told_apart(world: CopyNetwork) -> None:
    other = made_up(2, 5000)
    await world.giver(DATA, name="anna")
    await world.giver(other, name="ben")
    with pytest.raises(CopyFailed, match="choose one with --digest") as failed:
        await soon(world.find())
    for told in (DIGEST[:12], digest_of(other)[:12], "anna", "ben"):
        assert told in failed.value.message
    await soon(world.copy(digest_of(other)[:8]))
    assert world.target.read_bytes() == other


async def test_a_box_that_has_the_file_under_another_name_helps_by_digest(
    world: CopyNetwork,
) -> None:
    named = await world.giver(None)
    (named.folder / "else:1.gguf").write_bytes(DATA)
    done = await soon(world.copy(DIGEST))
    assert done.digest == DIGEST


# -- those who lie, and those who die --------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "said"),
    [(WrongPieces, "wrong piece"), (TooMuch, "more than piece"), (ShortList, "does not fit")],
)
async def test_a_source_with_wrong_data_is_named_and_left_out(
    world: CopyNetwork, kind: Any, said: str
) -> None:
    honest, liar = await world.giver(DATA), await world.giver(DATA, kind)
    done = await soon(world.copy())
    assert digest_of(world.target.read_bytes()) == DIGEST
    assert list(done.left_out) == [liar.source] and said in done.left_out[liar.source]
    assert done.sent == {honest.source: SIZE}


@pytest.mark.parametrize("kind", [WrongPieces, TooMuch, ShortList, Garbage])
async def test_a_copy_fails_when_its_only_source_sends_wrong_data(
    world: CopyNetwork, kind: Any
) -> None:
    await world.giver(DATA, kind, name="eve")
    with pytest.raises(CopyFailed, match="eve"):
        await soon(world.copy())
    assert not world.target.exists()


async def test_a_silent_one_does_not_hold_up_the_others(
    world: CopyNetwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Patience is short with the silent one alone: an honest one may be as slow as it likes."""
    monkeypatch.setattr(download, "MAX_FAILURES", 1)
    await world.giver(DATA)
    silent = await world.giver(DATA, Silent)
    fetch = download._FileDownload._fetch_piece

    async def impatient(self: Any, conversation: Any, source: Any) -> None:
        if source == silent.source:
            conversation._receive_seconds = 0.2
        await fetch(self, conversation, source)

    monkeypatch.setattr(download._FileDownload, "_fetch_piece", impatient)
    done = await soon(world.copy())
    assert done.left_out == {silent.source: "it is silent or too slow"}


@pytest.mark.parametrize("honest", [1, 2])
async def test_another_file_under_the_digest_is_found_out_by_the_whole(
    world: CopyNetwork, honest: int
) -> None:
    """Its first half is the right one: of the liar's list nothing else is kept."""
    false = DATA[: SIZE // 2] + made_up(3)[SIZE // 2 :]
    liar = await world.giver(false, AnotherFile)
    for _ in range(honest):
        await world.giver(DATA)
    done = await soon(world.copy(DIGEST))
    assert digest_of(world.target.read_bytes()) == DIGEST
    assert list(done.left_out) == [liar.source] and "another file" in done.left_out[liar.source]


async def test_a_file_that_is_not_what_its_digest_says_is_thrown_away(world: CopyNetwork) -> None:
    await world.giver(made_up(3), AnotherFile, name="eve")
    with pytest.raises(CopyFailed, match="eve sent is another file"):
        await soon(world.copy(DIGEST))
    assert not world.target.exists()
    assert list((world.target.parent / ".partial").iterdir()) == []


async def test_a_source_that_dies_half_way_is_replaced(world: CopyNetwork) -> None:
    dying = await world.giver(DATA, Dies)
    dying.sharing.giver = dying  # type: ignore[attr-defined]
    await world.giver(DATA)
    done = await soon(world.copy())
    assert digest_of(world.target.read_bytes()) == DIGEST and sum(done.sent.values()) == SIZE


async def test_a_copy_whose_only_source_died_goes_on_with_another(world: CopyNetwork) -> None:
    dying = await world.giver(DATA, Dies)
    dying.sharing.giver = dying  # type: ignore[attr-defined]
    with pytest.raises(CopyFailed, match=r"stopped at .* pull again"):
        await soon(world.copy())
    world.givers.remove(dying)
    await world.giver(DATA)
    done = await soon(world.copy())
    assert 0 < sum(done.sent.values()) < SIZE
    assert digest_of(world.target.read_bytes()) == DIGEST
    await dying.end()


# -- kill -9, a full disk --------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
async def test_a_killed_copy_goes_on_where_it_was(
    world: CopyNetwork, tmp_path: Path, seed: int
) -> None:
    giver = await world.giver(DATA, name="source")
    enough = random.Random(seed).randrange(3, 7) * PIECE_BYTES  # two of them may be unfinished
    await giver.database.close()  # the process below opens it
    child = subprocess.Popen(  # noqa: ASYNC220
        [sys.executable, "-m", "tests.support.model_copies", tmp_path, tmp_path, DIGEST],
        cwd=ROOT,
        env=environment(),
    )
    folder = world.target.parent / ".partial"

    def begun() -> bool:
        assert child.poll() is None, "it was not slow enough"
        return any(one.stat().st_blocks * 512 >= enough for one in folder.glob("*"))

    try:
        await wait_until(begun)
    finally:
        child.kill()
        child.wait()
    assert not world.target.exists() and world.partial.name == DIGEST
    await giver.database.open()
    done = await soon(world.copy())
    assert digest_of(world.target.read_bytes()) == DIGEST
    assert 0 < sum(done.sent.values()) <= SIZE - enough + 2 * PIECE_BYTES < SIZE


async def test_pieces_that_were_damaged_meanwhile_are_fetched_again(world: CopyNetwork) -> None:
    await world.giver(DATA)
    folder = world.target.parent / ".partial"
    folder.mkdir(parents=True)
    damaged = bytearray(DATA)
    damaged[PIECE_BYTES + 5] ^= 1
    (folder / DIGEST).write_bytes(damaged)
    done = await soon(world.copy())
    assert sum(done.sent.values()) == PIECE_BYTES
    assert digest_of(world.target.read_bytes()) == DIGEST


async def test_a_disk_without_room_is_seen_before_anything_is_asked(
    world: CopyNetwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    await world.giver(DATA)
    usage = type("Usage", (), {"free": SIZE})
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(CopyFailed, match=r"no room for the model: 138 MB are needed"):
        await soon(world.copy())
    assert list((world.target.parent / ".partial").iterdir()) == []


async def test_a_disk_that_fills_up_keeps_what_has_come(
    world: CopyNetwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    await world.giver(DATA)
    write, left = os.pwrite, [3 * PIECE_BYTES]

    def full(file: int, data: bytes, at: int) -> int:
        if left[0] < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        left[0] -= len(data)
        return write(file, data, at)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(CopyFailed, match=r"cannot be written .*No space left"):
        await soon(world.copy())
    monkeypatch.setattr(os, "pwrite", write)
    done = await soon(world.copy())
    assert sum(done.sent.values()) == SIZE - 3 * PIECE_BYTES


async def test_one_copy_at_a_time_and_nothing_is_written_over(world: CopyNetwork) -> None:
    await world.giver(DATA)
    held = partial_file.PartialFile(world.target.parent, DIGEST, SIZE, b"")
    with pytest.raises(CopyFailed, match="already"):
        await soon(world.copy())
    held.close()
    world.target.write_bytes(b"mine")
    with pytest.raises(CopyFailed, match="choose another name"):
        await soon(world.copy())
    assert world.target.read_bytes() == b"mine"


# -- what is given, and to whom --------------------------------------------------------------------


@pytest.mark.parametrize(
    "model", ["../secret", "/etc/passwd", "made:up/../../secret", "", "\0", "fake:1"]
)
async def test_only_what_is_in_the_catalog_is_given(world: CopyNetwork, model: str) -> None:
    giver = await world.giver(DATA)
    secret = giver.folder.parent / "secret"
    secret.write_bytes(DATA + b"x")
    outside = digest_of(DATA + b"x")
    for question in (Find(model, ""), Find(model, outside), List(outside), GivePiece(outside, 0)):
        assert isinstance(await asked(world, question), FileRefused)


async def test_a_model_that_is_no_longer_served_is_refused(world: CopyNetwork) -> None:
    giver = await world.giver(DATA)
    assert isinstance(await asked(world, GivePiece(DIGEST, 0)), PieceData)
    (giver.folder / f"{NAME}.gguf").unlink()
    assert isinstance(await asked(world, GivePiece(DIGEST, 0)), FileRefused)


async def test_a_box_that_does_not_share_says_so(world: CopyNetwork) -> None:
    giver = await world.giver(DATA, name="ann")
    giver.shares = False
    with pytest.raises(CopyFailed, match="ann: this box does not share its models"):
        await soon(world.find())


async def test_pieces_that_are_none_and_garbage(world: CopyNetwork) -> None:
    await world.giver(DATA)
    assert isinstance(await asked(world, GivePiece(DIGEST, COUNT)), FileRefused)
    assert isinstance(await asked(world, GivePiece(DIGEST, 2**31)), FileRefused)
    stream = await soon(world.open(world.sources[0].peer))
    await stream.send(b"\xc1garbage")
    with pytest.raises(LinkLost):
        await soon(stream.receive())
    with pytest.raises(ProtocolError):
        wire.decode(wire.encode(Find("m", "../../x")), file_wire.questions)


async def test_a_peer_has_so_many_conversations_and_no_more(world: CopyNetwork) -> None:
    await world.giver(DATA)
    streams = [await soon(world.open(world.sources[0].peer)) for _ in range(9)]
    answers = []
    for stream in streams:
        await stream.send(wire.encode(Find(NAME, "")))
        answers.append(read_answer(await soon(stream.receive())))
    assert [type(one) for one in answers] == [ModelAvailable] * upload.MAX_CONVERSATIONS + [
        FileRefused
    ]
    await streams[0].finish()
    assert await soon(streams[0].receive()) is None
    assert isinstance(await asked(world, Find(NAME, "")), ModelAvailable)


async def test_a_source_reports_that_a_hash_is_being_computed(
    world: CopyNetwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Longer than anybody bears silence."""
    monkeypatch.setattr(file_wire, "WORKING_SECONDS", 0.1)
    monkeypatch.setattr(download, "STALL_SECONDS", 10.0)

    class SlowHashes(Digests):
        async def hashes(self, model: Any, digest: str) -> bytes:
            await asyncio.sleep(12)
            return await super().hashes(model, digest)

    class Ponders(FileServer):
        def __init__(self, shared: Any, digests: Any, rate: Any) -> None:
            super().__init__(shared, SlowHashes(digests._database), rate)

    await world.giver(DATA, Ponders)
    assert not (await soon(world.copy())).left_out


# -- a limit ---------------------------------------------------------------------------------------


class Clock:
    """Time that passes only where somebody waits for it."""

    now = 0.0

    async def sleep(self, seconds: float) -> None:
        self.now += max(0.0, seconds)
        await asyncio.sleep(0)


async def test_all_copies_share_the_bytes_of_a_second(
    world: CopyNetwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy has two conversations, and both of them together have what is set."""
    clock = Clock()
    monkeypatch.setattr(upload, "_now", lambda: clock.now)
    monkeypatch.setattr(upload, "_sleep", clock.sleep)
    giver = await world.giver(DATA)
    giver.rate = 1e6
    await soon(world.copy())
    assert SIZE - file_wire.MAX_DATA_BYTES <= round(clock.now * 1e6) <= SIZE
    world.target.unlink()
    giver.rate, clock.now = 0.0, 0.0
    await soon(world.copy())
    assert clock.now == 0


async def test_under_a_low_limit_pieces_go_out_one_after_the_other(
    world: CopyNetwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who waits hears so, and has its turn when the one before it is done, or has left."""
    pausing, go_on = asyncio.Event(), asyncio.Event()

    async def sleep(_seconds: float) -> None:
        pausing.set()
        await go_on.wait()

    giver = await world.giver(DATA)
    assert isinstance(
        await asked(world, Find(NAME, "")), ModelAvailable
    )  # its digest is known from now on
    monkeypatch.setattr(upload, "_sleep", sleep)
    monkeypatch.setattr(file_wire, "WORKING_SECONDS", 0.01)
    giver.rate = 1e5
    streams = [await soon(world.open(world.sources[0].peer)) for _ in range(3)]
    await streams[0].send(wire.encode(GivePiece(DIGEST, 0)))
    await wait_until(pausing.is_set)
    for number in (1, 2):
        await streams[number].send(wire.encode(GivePiece(DIGEST, number)))
        for _ in range(9):
            assert isinstance(read_answer(await soon(streams[number].receive())), Working)
    streams[1].abandon()
    go_on.set()
    for number in (0, 2):
        left = partial_file.length(number, SIZE)
        while left:
            said = read_answer(await soon(streams[number].receive()))
            left -= len(said.data) if isinstance(said, PieceData) else 0
            assert isinstance(said, PieceData | Working)


async def test_a_models_projector_comes_with_it(world: CopyNetwork, tmp_path: Path) -> None:
    """Of two that differ, the one that most sources have; it is there before the model is."""
    usual = tiny_vision.put(tmp_path / "eye").projector.read_bytes()
    other = tiny_vision.put(tmp_path / "other").projector.read_bytes() + b"more"
    for projector in (other, usual, usual):
        giver = await world.giver(DATA)
        (giver.folder / f"mmproj-{NAME}.gguf").write_bytes(projector)
    copy = await world.copy()
    here = world.target.with_name(f"mmproj-{NAME}.gguf")
    assert copy.projector == here and here.read_bytes() == usual
    assert digest_of(world.target.read_bytes()) == DIGEST
    assert [path.name for path, _, _ in copy.files] == [here.name, world.target.name]
