"""The rules of a witness, status by status of C2SP tlog-witness, with a log written by hand."""

from __future__ import annotations

import asyncio
import hashlib
import sqlite3
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pinaivu_box.log import checkpoint, evidence, note, restart
from pinaivu_box.log.note import NoteError, NoteKey
from pinaivu_box.log.restart import Restart
from pinaivu_box.store import witnessed
from pinaivu_box.store.database import Database
from pinaivu_box.witness import selection
from pinaivu_box.witness.alarms import Alarms
from pinaivu_box.witness.rules import Rejected, read_submission
from pinaivu_box.witness.witness import NoStatement, Witness
from tests.support.keys import known_identity
from tests.support.written_log import WrittenLog, b64, cosignature_time, tree_hash

LOG, WITNESS, STRANGER = (known_identity(number) for number in (101, 102, 103))
pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class World:
    """A witness on a database of its own, which knows one log."""

    def __init__(self, database: Database, key_of: Callable[[str], NoteKey | None]) -> None:
        self.database = database
        self.alarms = Alarms(database)
        self.witness = Witness(WITNESS, database, self.alarms, key_of, lambda: 1_800_000_000.0)

    async def add(self, text: str, statement: bytes = b"", **more: Any) -> str:
        added = await self.witness.add_checkpoint(read_submission(text), statement, **more)
        return added.line

    async def refused(self, text: str, statement: bytes = b"", **more: Any) -> Rejected:
        with pytest.raises(Rejected) as caught:
            await self.add(text, statement, **more)
        return caught.value

    async def after_restart(self) -> World:
        """As the next process finds it."""
        other = World(self.database, self.witness._key_of)
        await other.alarms.open()
        await other.witness.open()
        return other


def knows_the_log(origin: str) -> NoteKey | None:
    try:
        known = checkpoint.node_of(origin) == LOG.node_id
    except NoteError:
        return None
    return checkpoint.log_key(origin) if known else None


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with Database(tmp_path / "witness.db") as database:
        yield World(database, knows_the_log)


def written(size: int, seed: str = "", epoch: int = 1_700_000_000_000) -> WrittenLog:
    return WrittenLog(LOG.signing_key, epoch, seed).grow(size)


# -- each status ----------------------------------------------------------------------------------


async def test_a_consistent_checkpoint_is_cosigned_and_kept(world: World) -> None:
    log = written(7)
    line = await world.add(log.submission(0))
    assert cosignature_time(line, WITNESS.signing_key, log.text()) == 1_800_000_000
    for size in (8, 9, 64, 65):
        old = len(log.entries)
        log.grow(size)
        line = await world.add(log.submission(old))
        cosignature_time(line, WITNESS.signing_key, log.text())
        other = await world.after_restart()
        assert other.witness.last[log.origin].size == size
        assert other.witness.last[log.origin].note == f"{log.note()}{line}"


async def test_the_same_checkpoint_is_cosigned_again(world: World) -> None:
    log = written(5)
    first = await world.add(log.submission(0))
    assert await world.add(log.submission(5)) == first  # at the same time


async def test_an_empty_log_is_cosigned_and_may_grow(world: World) -> None:
    log = written(0)
    await world.add(log.submission(0))
    await world.add(log.submission(0))
    await world.add(log.grow(3).submission(0))
    assert world.witness.last[log.origin].size == 3


async def test_404_for_a_log_that_is_not_known(world: World) -> None:
    stranger = WrittenLog(STRANGER.signing_key).grow(2)
    assert (await world.refused(stranger.submission(0))).status == 404
    other = "old 0\n\n" + stranger.signed(
        f"example.com/log\n2\n{b64(tree_hash(stranger.entries))}\n"
    )
    assert (await world.refused(other)).status == 404


async def test_403_without_the_signature_of_the_log(world: World) -> None:
    log = written(4)
    text = log.text()
    by_stranger = WrittenLog.line(log.origin, STRANGER.signing_key, text)
    assert (await world.refused(f"old 0\n\n{text}\n{by_stranger}")).status == 403
    # The right name and key id over another text.
    wrong = WrittenLog.line(log.origin, LOG.signing_key, log.text(3))
    assert (await world.refused(f"old 0\n\n{text}\n{wrong}")).status == 403
    # A signature of somebody else beside the right one does not count.
    both = f"old 0\n\n{log.note()}{WrittenLog.line('other', STRANGER.signing_key, text)}"
    cosignature_time(await world.add(both), WITNESS.signing_key, text)
    assert "other" not in world.witness.last[log.origin].note


async def test_400_for_an_old_size_beyond_the_checkpoint(world: World) -> None:
    log = written(4)
    assert (await world.refused(log.submission(0).replace("old 0", "old 5"))).status == 400


async def test_409_names_the_size_that_was_cosigned_last(world: World) -> None:
    log = written(4)
    await world.add(log.submission(0))
    log.grow(9)
    for old in (0, 3, 5, 9):
        refused = await world.refused(log.submission(old))
        assert (refused.status, refused.size) == (409, 4)
    assert world.witness.last[log.origin].size == 4
    refused = await world.refused(written(2).submission(1))
    assert (refused.status, refused.size) == (409, 4)  # an older checkpoint, which is no fork
    fresh = written(4, epoch=1_600_000_000_000)
    assert (await world.refused(fresh.submission(2))).size == 0
    assert not world.alarms.all


async def test_422_for_a_proof_that_does_not_lead_there(world: World) -> None:
    log = written(6)
    await world.add(log.submission(0))
    log.grow(11)
    right = log.submission(6)
    lines = right.split("\n")
    swapped = "\n".join([lines[0], lines[2], lines[1], *lines[3:]])
    missing = "\n".join([lines[0], *lines[2:]])
    doubled = "\n".join([lines[0], lines[1], *lines[1:]])
    for text in (swapped, missing, doubled):
        assert (await world.refused(text)).status == 422
    assert not world.alarms.all  # anybody may have sent this
    await world.add(right)


async def test_422_for_hashes_where_there_is_nothing_to_prove(world: World) -> None:
    log = written(3)
    line = b64(bytes(32))
    assert (await world.refused(log.submission(0).replace("old 0", f"old 0\n{line}"))).status == 422
    wrong = log.signed(f"{log.origin}\n0\n{line}\n")
    assert (await world.refused(f"old 0\n\n{wrong}")).status == 422


@pytest.mark.parametrize(
    "text",
    [
        "",
        "old 0",
        "old 00\n\n{note}",
        "old -1\n\n{note}",
        "old +1\n\n{note}",
        "old ٣\n\n{note}",
        "old 1e3\n\n{note}",
        "old  0\n\n{note}",
        "Old 0\n\n{note}",
        "old 99999999999999999999\n\n{note}",
        "old 0\n{note}",
        "old 0\n\n\n{note}",
        "old 0\r\n\r\n{note}",
        "old 0\nAAAA\n\n{note}",
        "old 0\n" + b64(bytes(32)) * 2 + "\n\n{note}",
        "old 0\n" + f"{b64(bytes(32))}\n" * 64 + "\n{note}",
        "old 0\n" + b64(bytes(32)).rstrip("=") + "\n\n{note}",
        "old 0\n\n{text}",
        "old 0\n\n{text}\n",
        "old 0\n\n{text}\n— {origin} AAAA\n",
        "old 0\n\n{unterminated}",
        "old 0\n\n{control}",
        "old 0\n\n{many}",
        "old 0\n\n{huge}",
        "old 0\n\n{short}",
        "old 0\n\n{twice}",
        "old 0\n\n{spelled}",
    ],
)  # fmt: skip
async def test_400_for_what_is_no_submission(world: World, text: str) -> None:
    log = written(3)
    whole, body = log.note(), log.text()
    lines = "".join(WrittenLog.line(f"n{n}", STRANGER.signing_key, body) for n in range(1000))
    parts = {
        "note": whole,
        "text": body,
        "origin": log.origin,
        "unterminated": whole.removesuffix("\n"),
        "control": log.signed(body.replace("\n3\n", "\n3\x1b[2J\n")),
        "many": whole + lines,
        "huge": log.signed(body + "x" * 70_000 + "\n"),
        "short": log.signed(f"{log.origin}\n3\n"),
        "twice": whole + whole.split("\n")[-2] + "\n",
        "spelled": log.signed(body.replace("\n3\n", "\n03\n")),
    }
    assert (await world.refused(text.format(**parts))).status == 400
    assert not world.witness.last


async def test_of_many_at_once_nothing_is_rolled_back(world: World) -> None:
    """The race of tlog-witness: what is judged against one state never replaces another."""
    log = written(4)
    await world.add(log.submission(0))
    log.grow(40)
    asked = [world.add(log.submission(4, size)) for size in (40, 9, 17, 5, 33)]
    results = await asyncio.gather(*asked, return_exceptions=True)
    right = [each for each in results if isinstance(each, str)]
    assert len(right) == 1
    assert {each.status for each in results if isinstance(each, Rejected)} == {409}
    (kept,) = await witnessed.load(world.database)
    assert kept.size == 40 and kept.note.endswith(right[0])


async def test_a_state_that_was_not_judged_is_not_replaced(world: World) -> None:
    """Also if two processes had the database."""
    log = written(4)
    await world.add(log.submission(0))
    other = await world.after_restart()
    await other.add(log.grow(9).submission(4))
    assert (await world.refused(log.submission(4, 6))).status == 409
    (kept,) = await witnessed.load(world.database)
    assert kept.size == 9


async def test_without_a_disk_nothing_is_cosigned(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = written(4)
    await world.add(log.submission(0))

    async def fails(*_: object) -> bool:
        raise sqlite3.OperationalError("database or disk is full")

    with monkeypatch.context() as patched:
        patched.setattr(witnessed, "keep", fails)
        with pytest.raises(sqlite3.OperationalError):
            await world.add(log.grow(9).submission(4))
    assert world.witness.last[log.origin].size == 4
    await world.add(log.submission(4))


async def test_logs_of_others_may_have_lines_of_their_own(tmp_path: Path) -> None:
    """Any log of the world, by its key."""
    log = WrittenLog(LOG.signing_key).grow(3)
    log.origin = "example.com/behind-the-sofa"
    name = log.origin.encode()
    data = b"\x01" + log.key.verify_key.encode()
    key_id = hashlib.sha256(name + b"\n" + data).hexdigest()[:8]
    key = note.read_key(f"{log.origin}+{key_id}+{b64(data)}", note.ED25519)
    async with Database(tmp_path / "witness.db") as database:
        world = World(database, lambda origin: key if origin == log.origin else None)
        text = f"{log.text()}anything\n"
        line = await world.add(f"old 0\n\n{log.signed(text)}")
        cosignature_time(line, WITNESS.signing_key, text)
        await world.add(log.grow(8).submission(3))
        fork = WrittenLog(LOG.signing_key, seed="fork").grow(9)
        fork.origin = log.origin
        assert (await world.refused(fork.submission(8))).status == 422


@pytest.mark.parametrize("text", ["x", "a+b", "a+00000000+AAAA", "a+00000000+" + b64(bytes(33))])
def test_what_is_no_key_of_a_log_is_refused(text: str) -> None:
    with pytest.raises(NoteError):
        note.read_key(text, note.ED25519)


# -- forks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("old", "new"), [(n, m) for n in (1, 2, 3, 7, 8) for m in range(n, 18)])
async def test_a_fork_is_evidence_that_anybody_can_verify(world: World, old: int, new: int) -> None:
    """Whatever the sizes: the log that was regrown proves it itself, by its new tree."""
    first, second = written(old, "first"), written(new, "second")
    await world.add(first.submission(0))
    refused = await world.refused(second.submission(old))
    assert refused.status == 422
    if old & (old - 1) or old == new:
        (alarm,) = world.alarms.all.values()
        assert (alarm.kind, alarm.node_id) == ("fork", LOG.node_id)
        assert all(step.ok for step in evidence.verify(alarm.document))
        assert world.alarms.forked(LOG.node_id) and world.alarms.forks_found == 1
        assert (await world.after_restart()).alarms.forked(LOG.node_id)
    else:  # the first hash is missing, for which the log is asked
        assert not world.alarms.all
        found = evidence.fork(
            note.read(first.note()),
            note.read(second.note()),
            (tree_hash(second.entries[:old]), *second.proof(old)),
        )
        assert found is not None and all(step.ok for step in evidence.verify(found.document))
    assert world.witness.last[first.origin].note.startswith(first.text())


@pytest.mark.parametrize(("old", "new"), [(n, m) for n in range(1, 9) for m in range(n, 12)])
def test_two_checkpoints_of_one_history_are_no_evidence(old: int, new: int) -> None:
    log = written(new)
    first, second = note.read(log.note(old)), note.read(log.note())
    for proof in (
        (),
        tuple(log.proof(old)),
        (tree_hash(log.entries[:old]), *log.proof(old)),
        (bytes(32), *log.proof(old)),
        (bytes(32),) * 3,
    ):
        assert evidence.fork(first, second, proof) is None


def test_evidence_with_any_byte_changed_proves_nothing() -> None:
    first, second = written(5, "first"), written(7, "second")
    found = evidence.fork(note.read(first.note()), note.read(second.note()), tuple(second.proof(5)))
    assert found is not None
    document, twin = found.document, found
    for position in range(len(document)):
        changed = bytearray(document)
        changed[position] ^= 1
        steps = evidence.verify(bytes(changed))
        if all(step.ok for step in steps):  # white space, which says nothing
            assert evidence.id_of(bytes(changed)) == evidence.id_of(twin.document)
            assert chr(document[position]).isspace() or chr(changed[position]).isspace()


def test_a_made_up_checkpoint_is_no_evidence() -> None:
    log, forged = written(5), WrittenLog(STRANGER.signing_key, seed="x").grow(5)
    forged.origin = log.origin
    assert evidence.fork(note.read(log.note()), note.read(forged.note())) is None


async def test_of_evidence_only_what_was_verified_is_kept(world: World) -> None:
    """Whoever brings it may have put other lines below the signatures of the log."""
    first, second = written(5, "first"), written(5, "second")
    found = evidence.fork(note.read(first.note()), note.read(second.note()))
    assert found is not None
    junk = "".join(f"\u2014 junk{n} {b64(bytes([n]) * 99)}\n" for n in range(60))
    stuffed = msgspec.structs.replace(
        found, checkpoints=(found.checkpoints[0] + junk, found.checkpoints[1] + junk)
    )
    assert all(step.ok for step in evidence.verify(stuffed.document))
    assert evidence.normalised(stuffed.document) == found.document
    await world.alarms.add_evidence(stuffed.document.replace(b"\n  ", b"\n       "))
    (alarm,) = world.alarms.all.values()
    assert alarm.document == found.document
    assert (await world.after_restart()).alarms.all[alarm.id].document == found.document
    for document in (b"{}", stuffed.document.replace(b"junk0", b"")):
        with pytest.raises(NoteError):
            await world.alarms.add_evidence(document)


async def test_of_a_log_that_forks_each_time_only_the_first_are_kept(world: World) -> None:
    await world.add(written(3, "first").submission(0))
    for size in range(4, 20):
        await world.refused(written(size, "second").submission(3))
    assert len(world.alarms.all) == witnessed.MAX_ALARMS_PER_LOG


async def test_of_a_box_that_begins_logs_without_end_the_first_are_kept(world: World) -> None:
    await world.add(written(3).submission(0))
    for epoch in range(1_700_000_000_001, 1_700_000_000_041):
        fresh = written(2, epoch=epoch)
        for _ in range(3):
            await world.refused(fresh.submission(0), by_log=True)
    kinds = {alarm.kind for alarm in world.alarms.all.values()}
    assert kinds == {"no-statement"}
    assert len(world.alarms.all) == witnessed.MAX_ALARMS_PER_BOX


# -- restarts -------------------------------------------------------------------------------------


def stated(log: WrittenLog, before: WrittenLog | None, size: int | None = None) -> bytes:
    said = Restart(
        node_id=LOG.node_id,
        origin=log.origin,
        previous_origin=before.origin if before else None,
        last_checkpoint=before.note(size) if before and size != 0 else None,
        time="2026-01-01T00:00:00Z",
        reason="The database of the box was lost.",
    )
    return msgspec.json.encode(restart.sign(LOG, said))


async def test_a_stated_restart_is_no_fork(world: World) -> None:
    before, after = written(9), written(2, "after", 1_700_000_000_001)
    await world.add(before.submission(0))
    line = await world.add(after.submission(0), stated(after, before), by_log=True)
    cosignature_time(line, WITNESS.signing_key, after.text())
    assert not world.alarms.all
    # The former log has ended.
    assert (await world.refused(before.grow(10).submission(9))).status == 422
    await world.add(after.grow(5).submission(2))


async def test_a_restart_says_how_much_it_has_lost(world: World) -> None:
    before, after = written(9), written(2, "after", 1_700_000_000_001)
    await world.add(before.submission(0))
    await world.add(after.submission(0), stated(after, before, 4), by_log=True)
    (alarm,) = world.alarms.all.values()
    assert alarm.kind == "restart" and "lost 5 entries" in alarm.detail
    assert not world.alarms.forked(LOG.node_id)


async def test_a_statement_with_a_later_checkpoint_loses_nothing(world: World) -> None:
    before, after = written(9), written(2, "after", 1_700_000_000_001)
    await world.add(before.submission(0, 6))
    await world.add(after.submission(0), stated(after, before), by_log=True)
    assert not world.alarms.all


async def test_a_new_log_without_a_statement_is_not_cosigned(world: World) -> None:
    before, after = written(9), written(2, "after", 1_700_000_000_001)
    await world.add(before.submission(0))
    for _ in range(5):
        refused = await world.refused(after.submission(0))  # anybody may send this
        assert isinstance(refused, NoStatement) and refused.former.startswith(before.text())
    assert not world.alarms.all
    wrong = (b"", b"{}", b"\xff", stated(before, None), stated(after, before)[:-20] + b"0" * 18)
    for statement in wrong:
        assert (await world.refused(after.submission(0), statement, by_log=True)).status == 422
    (alarm,) = world.alarms.all.values()
    assert alarm.kind == "no-statement" and not world.alarms.forked(LOG.node_id)
    await world.add(after.submission(0), stated(after, before), by_log=True)


async def test_a_statement_may_not_hide_another_fork(world: World) -> None:
    """It names a checkpoint of the size that was cosigned, with another root."""
    before, other = written(9), written(9, "other")
    after = written(2, "after", 1_700_000_000_001)
    await world.add(before.submission(0))
    refused = await world.refused(after.submission(0), stated(after, other), by_log=True)
    assert refused.status == 422 and world.alarms.forked(LOG.node_id)


async def test_an_older_log_does_not_come_back(world: World) -> None:
    await world.add(written(3, epoch=1_700_000_000_001).submission(0))
    assert (await world.refused(written(9).submission(0))).status == 422


# -- who witnesses whom ---------------------------------------------------------------------------


def test_up_to_16_members_all_witness_all() -> None:
    members = [known_identity(number).node_id for number in range(16)]
    for member in members:
        assert selection.witnesses_of(member, members) == set(members) - {member}


def test_of_17_and_more_rendezvous_hashing_picks_8() -> None:
    members = [known_identity(number).node_id for number in range(60)]
    picked = {member: selection.witnesses_of(member, members[:17]) for member in members[:17]}
    for member, witnesses in picked.items():
        assert len(witnesses) == 8 and member not in witnesses
        assert witnesses == selection.witnesses_of(member, members[16::-1])
    many = {member: selection.witnesses_of(member, members) for member in members}
    counts = [sum(member in witnesses for witnesses in many.values()) for member in members]
    assert min(counts) > 0  # nobody is left out
    # Who leaves changes at most one witness of each log.
    for member, witnesses in many.items():
        remaining = [one for one in members if one != members[5]]
        if member != members[5]:
            assert len(witnesses - selection.witnesses_of(member, remaining)) <= 1
