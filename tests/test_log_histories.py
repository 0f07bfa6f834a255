"""When a log goes on: after kill -9, after retention, with receipts from before there was one.  And
when another begins: after a restore, and with what a witness has."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import random
import shutil
import sqlite3
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar
from unittest.mock import patch

import pytest
from nacl.signing import SigningKey

from pinaivu_box.config import RetentionConfig
from pinaivu_box.home import database_of, identity_of
from pinaivu_box.identity import Identity
from pinaivu_box.log import checkpoint, entry_proof, note, restart
from pinaivu_box.log.checkpoint import Checkpoint
from pinaivu_box.log.entry_proof import EntryProof, entry_of
from pinaivu_box.log.merkle import is_consistent
from pinaivu_box.log.note import Note, NoteError
from pinaivu_box.log.restart import SignedRestart
from pinaivu_box.log.tiles import Tile, TilePath
from pinaivu_box.receipt_log import adoption, histories, last_shown
from pinaivu_box.receipt_log import service as service_module
from pinaivu_box.receipt_log.service import ReceiptLog
from pinaivu_box.store import log as store
from pinaivu_box.store import retention
from pinaivu_box.store.database import Database, SqlStatement
from pinaivu_box.witness.wire import MAX_STATEMENT_BYTES
from tests.support.fake_model import FAKE, ask_fake_model
from tests.support.in_process_command import run_command
from tests.support.keys import known_identity
from tests.support.process_box import Box, wait_until

T = TypeVar("T")
ARGUMENTS = ("--model", f"{FAKE}=fake:0")
BEFORE = Path(__file__).parent / "before"
WITNESS = Identity(SigningKey(bytes(range(32))))


@contextlib.contextmanager
def running(home: Path, key: str = "") -> Iterator[Box]:
    box = Box(home, *ARGUMENTS)
    box.key = key
    try:
        yield box.start()
    finally:
        box.end()


def read(signed: str) -> Checkpoint:
    found = note.read(signed)
    said = checkpoint.read(found)
    assert checkpoint.is_signed(found, said)
    return said


def proven(box: Box, request_id: str) -> EntryProof:
    """The proof in a receipt, verified."""
    answer = box.http("GET", f"/v1/receipts/{request_id}")
    assert answer.status_code == 200, answer.text
    proof = entry_proof.read(answer.json()["inclusion"])
    entry = entry_of(answer.json()["signed_receipt"].encode())
    assert proof.includes(entry, read(str(proof.note)))
    return proof


def newest(box: Box) -> Checkpoint:
    return read(box.http("GET", "/v1/log/checkpoint").text)


def query(home: Path, sql: str, *values: Any) -> list[Any]:
    with contextlib.closing(sqlite3.connect(home / "pinaivu.db")) as connection, connection:
        return connection.execute(sql, values).fetchall()


def findings(home: Path) -> list[str]:
    done = run_command("receipts", "verify", "--all", "--json", home=home, check=False)
    return [one["message"] for one in json.loads(done.stdout)["findings"]]


def with_log(home: Path, work: Callable[[ReceiptLog, Database], Awaitable[Any]]) -> Any:
    """On the log of a home whose box is stopped, opened as at a start."""

    async def run() -> Any:
        async with database_of(home) as database:
            service = ReceiptLog(identity_of(home), database, home)
            await service.open()
            return await work(service, database)

    return asyncio.run(run())


@pytest.fixture(scope="module")
def used(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], str]:
    """A home with the receipts of five requests, which is stopped; their ids, and its key."""
    home = tmp_path_factory.mktemp("log") / "home"
    with running(home) as box:
        ids = [ask_fake_model(box) for _ in range(5)]
        box.stop()
    return home, ids, box.key


@pytest.fixture
def home(used: tuple[Path, list[str], str], tmp_path: Path) -> Path:
    shutil.copytree(used[0], tmp_path / "home")
    return tmp_path / "home"


# -- it goes on ------------------------------------------------------------------------------------


def test_a_box_that_stops_has_covered_all_its_entries(home: Path) -> None:
    assert read((home / "log.checkpoint").read_text()).size == 5
    assert findings(home) == []


def test_a_log_goes_on_after_kill_9(tmp_path: Path) -> None:
    """Whenever it comes: what was shown stays true, and what was acknowledged is in."""
    home, acknowledged, shown = tmp_path / "home", [], []
    key, pauses = "", random.Random(7)
    for _ in range(4):
        with running(home, key) as box:
            key = box.key
            stop = threading.Event()

            def work(box: Box = box, stop: threading.Event = stop) -> None:
                with contextlib.suppress(Exception):
                    while not stop.is_set():
                        acknowledged.append(ask_fake_model(box))
                        shown.append(newest(box))

            workers = [threading.Thread(target=work, daemon=True) for _ in range(4)]
            for worker in workers:
                worker.start()
            before = len(shown)
            wait_until(lambda before=before: len(shown) > before + 5, "checkpoints")
            time.sleep(pauses.random() / 10)
            box.kill()
            stop.set()
            for worker in workers:
                worker.join(180)
    with running(home, key) as box:
        last = newest(box)
        assert {said.origin for said in shown} == {last.origin}
        roots: dict[int, bytes] = {}
        for said in [*shown, last]:
            assert roots.setdefault(said.size, said.root) == said.root
        for request_id in acknowledged[:: max(1, len(acknowledged) // 20)]:
            assert proven(box, request_id).index < last.size
        box.stop()
    assert findings(home) == []


def test_retention_keeps_the_entries_and_the_proofs(home: Path, used: Any) -> None:
    _, ids, key = used
    query(home, "UPDATE receipts SET created_at = 0 WHERE request_id IN (?, ?)", ids[1], ids[3])
    with running(home, key) as box:
        before = {request_id: proven(box, request_id) for request_id in ids}
        box.stop()

    async def retain(service: ReceiptLog, database: Database) -> None:
        policy = RetentionConfig(receipts="30d")
        await retention.apply(database, policy, 10**12, service.removals)

    with_log(home, retain)
    assert findings(home) == []
    assert query(home, "SELECT count(*) FROM log_removals") == [(1,)]
    with running(home, key) as box:
        for request_id in ids:
            status = box.http("GET", f"/v1/receipts/{request_id}").status_code
            assert status == (404 if request_id in (ids[1], ids[3]) else 200)
        assert proven(box, ids[4]).index == before[ids[4]].index
        ask_fake_model(box)
        wait_until(lambda: newest(box).size == 6, "a checkpoint with the new entry")
        lines = box.http("GET", "/v1/log/consistency?from=5&to=6").text
        assert lines  # the log has only grown
        box.stop()
    query(home, "DELETE FROM receipts WHERE request_id = ?", ids[0])
    assert len(findings(home)) == 1  # that was nobody who signs


def test_later_removals_join_the_record_of_earlier_ones(home: Path) -> None:
    async def remove_all(service: ReceiptLog, database: Database) -> None:
        for entry in (2, 1, 5, 3):
            recorded = await service.removals([entry])
            deletion = ("DELETE FROM receipts WHERE log_entry = ?", (entry,))
            await database.write(*recorded, deletion)

    with_log(home, remove_all)
    assert findings(home) == []
    ((signed,),) = query(home, "SELECT signed FROM log_removals")
    assert json.loads(signed)["entries"] == [[0, 2], [4, 4]]


def test_receipts_from_before_there_was_a_log_get_entries(tmp_path: Path) -> None:
    home = tmp_path / "home"
    shutil.copytree(BEFORE / "home", home, ignore=shutil.ignore_patterns("*.sql"))
    with contextlib.closing(sqlite3.connect(home / "pinaivu.db")) as database:
        database.executescript((BEFORE / "home" / "pinaivu.sql").read_text())
    count = query(home, "SELECT count(*) FROM receipts")[0][0]
    assert count
    doctor = run_command("doctor", "--json", home=home, check=False, env={"PINAIVU_PORT": "0"})
    (check,) = [one for one in json.loads(doctor.stdout) if one["name"] == "log"]
    assert (check["state"], check["found"][:8]) == ("ok", "none yet")

    async def look(service: ReceiptLog, database: Database) -> None:
        rows = await database.read("SELECT request_id FROM receipts ORDER BY created_at, rowid")
        for index, (request_id,) in enumerate(rows):
            proof = await service.entry_proof(request_id)
            assert proof is not None and proof.index == index
        assert await database.read("SELECT * FROM log_pending") == []

    with_log(home, look)
    assert findings(home) == []


def test_an_adoption_that_was_interrupted_goes_on(home: Path) -> None:
    ids = query(home, "SELECT request_id FROM receipts ORDER BY log_entry")
    query(home, "UPDATE receipts SET log_entry = NULL WHERE log_entry > 2")
    query(home, "INSERT INTO log_pending VALUES ('adopt')")

    async def look(service: ReceiptLog, _database: Database) -> list[int]:
        proofs = [await service.entry_proof(request_id) for (request_id,) in ids]
        return [proof.index for proof in proofs if proof is not None]

    assert with_log(home, look) == [0, 1, 5, 6, 7]


@pytest.fixture
def in_small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is adopted before the box serves, and then one receipt after the other."""
    monkeypatch.setattr(histories, "BEFORE_SERVING", 0)
    monkeypatch.setattr(adoption, "BATCH", 1)
    monkeypatch.setattr(service_module, "BATCH", 1)


async def until_adopted(service: ReceiptLog) -> None:
    keeping = asyncio.create_task(service.keep())
    await wait_for(lambda: service.histories.adoption and service.histories.adoption.done)
    async with service._lock:  # it has examined what it has done
        keeping.cancel()
    await asyncio.gather(keeping, return_exceptions=True)


@pytest.fixture
def unlogged(home: Path) -> tuple[Path, list[str]]:
    """A home with five receipts from before there was a log, and their ids."""
    query(home, "DROP TRIGGER log_entries_are_not_deleted")
    for table in ("logs", "log_entries", "log_tiles", "log_checkpoints", "sqlite_sequence"):
        query(home, f"DELETE FROM {table}")
    query(home, "UPDATE receipts SET log_entry = NULL")
    query(home, "INSERT INTO log_pending VALUES ('adopt')")
    (home / last_shown.NAME).unlink()
    rows = query(home, "SELECT request_id FROM receipts ORDER BY created_at, rowid")
    return home, [request_id for (request_id,) in rows]


@pytest.mark.usefixtures("in_small_steps")
def test_older_receipts_get_entries_between_new_ones(unlogged: tuple[Path, list[str]]) -> None:
    home, ids = unlogged

    async def look(service: ReceiptLog, database: Database) -> None:
        assert await service.entry_proof(ids[0]) is None and service.findings == []
        assert await asyncio.to_thread(findings, home) == []  # it is known that they are to come
        assert await service._adopt()
        await database.write(store.append(b"a new receipt"))  # as one would be stored now
        await until_adopted(service)
        proofs = [await service.entry_proof(one) for one in ids]
        assert [one.index for one in proofs if one is not None] == [0, 2, 3, 4, 5]
        await wait_for(lambda: service.findings)
        (found,) = service.findings  # it has no receipt here
        assert found.startswith("entry 1 has no receipt")

    with_log(home, look)


@pytest.mark.usefixtures("in_small_steps")
def test_a_log_that_begins_in_the_middle_gives_each_receipt_one_entry(
    unlogged: tuple[Path, list[str]],
) -> None:
    """Also to those that had got theirs in the log before, which no checkpoint has covered."""
    home, ids = unlogged

    async def look(service: ReceiptLog, _database: Database) -> None:
        for _ in range(3):
            assert await service._adopt()
        await service.histories.begin("It was the test's wish.", None)
        await until_adopted(service)
        proofs = [await service.entry_proof(one) for one in ids]
        assert [one.index for one in proofs if one is not None] == [0, 1, 2, 3, 4]

    with_log(home, look)
    entries = query(home, "SELECT count(DISTINCT log_entry), count(*) FROM receipts")
    assert entries == [(5, 5)]


@pytest.mark.usefixtures("in_small_steps")
def test_a_receipt_that_was_inserted_is_found_once_older_ones_have_entries(
    unlogged: tuple[Path, list[str]],
) -> None:
    home, ids = unlogged
    forged = "UPDATE receipts SET signature = zeroblob(64) WHERE request_id = ?"
    query(home, forged, ids[3])

    async def look(service: ReceiptLog, _database: Database) -> list[str]:
        assert service.findings == []
        await until_adopted(service)
        return service.findings

    (found,) = with_log(home, look)
    assert f"the receipt of {ids[3]} was never logged" in found


async def wait_for(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


# -- another begins --------------------------------------------------------------------------------


def test_a_restored_box_begins_another_log(tmp_path: Path, home: Path, used: Any) -> None:
    _, ids, key = used
    file = tmp_path / "box.backup"
    run_command("backup", str(file), home=home)
    with running(home, key) as box:
        later = [ask_fake_model(box) for _ in range(3)]
        last = read(str(proven(box, later[-1]).note))
        box.stop()
    run_command("restore", str(file), "--force", home=home)
    with running(home, key) as box:
        shown = box.http("GET", "/v1/log").json()
        said = restart.read(SignedRestart(**shown["restart"]))
        assert (said.origin, said.previous_origin) == (shown["origin"], last.origin)
        assert said.reason == "The box was restored from a backup."
        assert read(said.last_checkpoint or "") == last  # not that of the backup
        assert [one["origin"] for one in shown["earlier"]] == [last.origin]
        # What the old log has proven stays proven; what comes is in the new one.
        old = read(str(proven(box, ids[0]).note))
        assert (old.origin, old.size) == (last.origin, 5)
        assert proven(box, ask_fake_model(box)).index == 0
        assert newest(box).origin == shown["origin"]
        box.stop()
    assert findings(home) == []
    with running(home, key) as box:  # and that one goes on
        assert newest(box).origin == shown["origin"] and newest(box).size == 1


def test_a_backup_of_entries_without_a_checkpoint_proves_them_anew(
    tmp_path: Path, home: Path, used: Any
) -> None:
    _, ids, key = used
    query(home, "DELETE FROM log_checkpoints WHERE size > 3")
    file = tmp_path / "box.backup"
    run_command("backup", str(file), home=home)
    run_command("restore", str(file), home=tmp_path / "new")
    with running(tmp_path / "new", key) as box:
        shown = box.http("GET", "/v1/log").json()
        assert {read(str(proven(box, one).note)).origin for one in ids} == {shown["origin"]}
        box.stop()
    assert findings(tmp_path / "new") == []


def test_a_lost_database_begins_another_log(home: Path, used: Any) -> None:
    last = read((home / "log.checkpoint").read_text())
    for path in home.glob("pinaivu.db*"):
        path.unlink()
    with running(home) as box:
        shown = box.http("GET", "/v1/log").json()
    said = restart.read(SignedRestart(**shown["restart"]))
    assert read(said.last_checkpoint or "") == last and said.previous_origin == last.origin
    assert shown["origin"] != last.origin


# -- what witnesses have ---------------------------------------------------------------------------


def lost(home: Path) -> None:
    """All but the key."""
    for path in (*home.glob("pinaivu.db*"), home / "log.checkpoint"):
        path.unlink()


def test_a_witness_knows_what_a_lost_disk_had(home: Path) -> None:
    last = note.read((home / "log.checkpoint").read_text())
    lost(home)

    async def learn(service: ReceiptLog, _database: Database) -> SignedRestart:
        assert service.current.restart is None
        origin = service.origin
        for _ in range(2):  # the second time says nothing new
            await service.seen_elsewhere(last)
        assert service.origin == origin
        signed, signature = service.current.restart, service.current.signature
        assert signed is not None and signature is not None
        return SignedRestart(signed.decode(), signature.hex())

    said = restart.read(with_log(home, learn))
    assert said.last_checkpoint == str(last)


def test_a_witness_knows_that_the_whole_home_is_an_older_copy(
    tmp_path: Path, home: Path, used: Any
) -> None:
    shutil.copytree(home, tmp_path / "older")
    with running(home, used[2]) as box:
        last = proven(box, ask_fake_model(box)).note
        box.stop()

    async def learn(service: ReceiptLog, _database: Database) -> tuple[str, int]:
        await service.seen_elsewhere(last)
        return service.origin, len(service.histories.all)

    origin, logs = with_log(tmp_path / "older", learn)
    assert origin != read(str(last)).origin and logs == 2


def test_only_its_own_checkpoints_are_believed(home: Path) -> None:
    last = note.read((home / "log.checkpoint").read_text())
    said = checkpoint.read(last)
    foreign = checkpoint.sign(
        WITNESS, Checkpoint(checkpoint.origin(WITNESS.node_id, 10**15), 9, bytes(32))
    )
    forged = Note(Checkpoint(said.origin, 9, bytes(32)).text, last.signatures)

    async def learn(service: ReceiptLog, _database: Database) -> None:
        for signed in (foreign, forged):
            with pytest.raises(NoteError):
                await service.seen_elsewhere(signed)
        await service.seen_elsewhere(last)
        assert service.origin == said.origin

    with_log(home, learn)


def test_cosignatures_are_kept_and_shown(home: Path, used: Any) -> None:
    ids = used[1]
    last = note.read((home / "log.checkpoint").read_text())

    async def cosign(service: ReceiptLog, database: Database) -> None:
        signature = checkpoint.cosign(WITNESS, last.text, 1_700_000_000)
        assert await service.add_cosignatures(note.joined(last, [signature])) == 1
        assert await service.add_cosignatures(note.joined(last, [signature])) == 1
        proof = await service.entry_proof(ids[0])
        assert proof is not None
        found = checkpoint.cosignature(proof.note, WITNESS.node_id)
        assert found is not None and found.time == 1_700_000_000
        wrong = signature._replace(signature=signature.signature[:-1] + b"x")
        unknown = Checkpoint(service.origin, 4, bytes(32))
        for refused in (
            note.joined(last, [wrong]),
            checkpoint.sign(identity_of(home), unknown),
        ):
            with pytest.raises(NoteError):
                await service.add_cosignatures(refused)

    with_log(home, cosign)


def test_a_statement_has_room_whoever_has_cosigned(home: Path) -> None:
    """A link carries one of a certain length only."""
    last = note.read((home / "log.checkpoint").read_text())

    async def begin(service: ReceiptLog, _database: Database) -> None:
        many = [checkpoint.cosign(known_identity(n), last.text, 1_700_000_000) for n in range(60)]
        assert await service.add_cosignatures(note.joined(last, many)) == 60
        await service.histories.begin("For a test.", None)
        assert len(service.statement()) <= MAX_STATEMENT_BYTES
        said = restart.read(SignedRestart(**json.loads(service.statement())))
        assert said.last_checkpoint == str(last)

    with_log(home, begin)


def test_the_newest_checkpoint_with_cosignatures_is_the_one_of_a_proof(
    home: Path, used: Any
) -> None:
    _, ids, key = used
    last = note.read((home / "log.checkpoint").read_text())

    async def cosign(service: ReceiptLog, _database: Database) -> None:
        signature = checkpoint.cosign(WITNESS, last.text, 1_700_000_000)
        await service.add_cosignatures(note.joined(last, [signature]))

    with_log(home, cosign)
    with running(home, key) as box:
        young = ask_fake_model(box)
        assert read(str(proven(box, young).note)).size == 6
        assert read(str(proven(box, ids[0]).note)).size == 5
        assert checkpoint.witnesses_named(proven(box, ids[0]).note) == [WITNESS.node_id]


def test_listeners_hear_of_each_checkpoint(home: Path) -> None:
    async def listen(service: ReceiptLog, database: Database) -> None:
        heard: list[Note] = []
        service.listeners.append(heard.append)
        await service.cover()
        assert heard == []  # nothing has grown
        await database.write(("INSERT INTO log_entries (hash) VALUES (?)", (bytes(32),)))
        await service.cover()
        assert [checkpoint.read(signed).size for signed in heard] == [6]
        assert read((home / "log.checkpoint").read_text()).size == 6

    with_log(home, listen)


# -- a long log ------------------------------------------------------------------------------------


def mth(leaves: list[bytes]) -> bytes:
    """RFC 6962, section 2.1, over hashes of leaves."""
    if len(leaves) < 2:
        return leaves[0] if leaves else hashlib.sha256(b"").digest()
    k = 1 << (len(leaves) - 1).bit_length() - 1
    return hashlib.sha256(b"\x01" + mth(leaves[:k]) + mth(leaves[k:])).digest()


def grow(home: Path, entries: list[bytes]) -> None:
    with contextlib.closing(sqlite3.connect(home / "pinaivu.db")) as connection, connection:
        rows = [(entry,) for entry in entries]
        connection.executemany("INSERT INTO log_entries (hash) VALUES (?)", rows)


LONG = 70_000  # the example of C2SP tlog-tiles
TILES = [  # of its last tiles: level, number, and width
    (0, 272, 256), (0, 273, 112), (1, 0, 256), (1, 1, 17), (2, 0, 1),
]  # fmt: skip


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[bytes], list[Checkpoint]]:
    """A home with a log of 70,000 entries without receipts, its entries, and checkpoints that were
    made while it grew."""
    home = tmp_path_factory.mktemp("long") / "home"
    home.mkdir(mode=0o700)
    chance = random.Random(20)
    entries = [chance.randbytes(32) for _ in range(LONG)]
    sizes = [1, 2, 255, 256, 257, 511, 65_535, 65_536, 65_537, 69_999, LONG]

    async def fill(service: ReceiptLog, _database: Database) -> list[Checkpoint]:
        made, size = [], 0
        for to in sizes:
            grow(home, entries[size:to])
            await service.cover()
            signed = await service.latest()
            assert signed is not None
            made.append(read(signed.note))
            size = to
        return made

    made = with_log(home, fill)
    assert [said.size for said in made] == sizes
    return home, entries, made


def with_service(home: Path, work: Callable[[ReceiptLog], Awaitable[T]]) -> T:
    """Without the look at receipts, which these entries lack."""

    async def run() -> T:
        async with database_of(home) as database:
            service = ReceiptLog(identity_of(home), database, home)
            await service.histories.open()
            return await work(service)

    return asyncio.run(run())


def test_roots_of_a_long_log(long: Any) -> None:
    _, entries, made = long
    leaves = [hashlib.sha256(b"\x00" + entry).digest() for entry in entries]
    for said in made:
        assert said.root == mth(leaves[: said.size])


def test_tiles_of_a_long_log(long: Any) -> None:
    home, entries, _ = long
    leaves = [hashlib.sha256(b"\x00" + entry).digest() for entry in entries]

    async def look(service: ReceiptLog) -> None:
        for level, number, width in TILES:
            found = await service.tile(TilePath(Tile(level, number, width), False))
            count = 256**level
            first = number * 256 * count
            starts = range(first, first + width * count, count)
            assert found == b"".join(mth(leaves[start : start + count]) for start in starts)
            for more in (Tile(level, number + 2), Tile(level, number, min(width + 1, 255))):
                if more.width > width or more.index > number:
                    assert await service.tile(TilePath(more, False)) is None
        bundle = await service.tile(TilePath(Tile(0, 273, 112), True))
        assert bundle == b"".join(b"\x00\x20" + entry for entry in entries[-112:])

    with_service(home, look)


def test_growth_of_a_long_log(long: Any) -> None:
    home, _, made = long

    async def look(service: ReceiptLog) -> None:
        for number, old in enumerate(made):
            for new in made[number:]:
                proof = await service.consistency(old.size, new.size)
                assert is_consistent(old.size, old.root, new.size, new.root, proof)

    with_service(home, look)


def test_hashes_that_were_changed_are_made_anew(long: Any, tmp_path: Path) -> None:
    home, _, made = long
    shutil.copytree(home, tmp_path / "home")
    changed = "UPDATE log_tiles SET hashes = zeroblob(length(hashes)) WHERE level = 1"
    query(tmp_path / "home", changed)
    assert any("a stored hash of the log" in message for message in findings(tmp_path / "home"))

    async def look(service: ReceiptLog) -> list[str]:
        assert service.origin == made[-1].origin
        proof = await service.consistency(made[0].size, LONG)
        assert is_consistent(1, made[0].root, LONG, made[-1].root, proof)
        return service.histories.findings

    assert len(with_service(tmp_path / "home", look)) == 1
    assert not any("stored hash" in message for message in findings(tmp_path / "home"))


# -- what goes, and what cannot be made ------------------------------------------------------------


def test_an_erased_account_leaves_its_receipts_proven(home: Path, used: Any) -> None:
    with running(home, used[2]) as box:
        box.http("POST", "/v1/admin/accounts", json={"name": "ada"})
        made = box.http("POST", "/v1/admin/keys", json={"account": "ada"}).json()
        body = {"model": FAKE, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
        answer = box.http("POST", "/v1/chat/completions", key=made["key"], json=body)
        request_id = answer.json()["request_id"]
        before = proven(box, request_id)
        run_command("accounts", "erase", "ada", "--yes", home=home)
        assert proven(box, request_id).index == before.index
        box.stop()
    assert findings(home) == []


def test_a_checkpoint_is_made_once_a_second_at_most(home: Path) -> None:
    async def ask(service: ReceiptLog, _database: Database) -> list[int]:
        sizes = []
        for seconds in (0.0, 1e9, 0.0):
            grow(home, [bytes(32)])
            with patch.object(service_module, "_MIN_SECONDS", seconds):
                sizes.append(checkpoint.read(await service.checkpoint()).size)
        return sizes

    assert with_log(home, ask) == [6, 6, 8]


def test_a_receipt_is_shown_where_no_checkpoint_can_be_made(home: Path, used: Any) -> None:
    async def ask(service: ReceiptLog, _database: Database) -> None:
        grow(home, [bytes(32)])
        with patch.object(last_shown, "write", side_effect=OSError(28, "No space left on device")):
            assert await service.inclusion("req_none") is None
            await service.cover()  # says so in the log file
            latest = await service.latest()
            assert latest is not None and latest.size == 5  # nobody was shown another
            assert str(await service.checkpoint()) == latest.note
        assert await service.inclusion(used[1][0]) is not None

    with_log(home, ask)


def test_a_receipt_that_gets_another_entry_meanwhile_is_deleted_with_that_one(home: Path) -> None:
    """Retention reads what is old, another log begins, and only then does it delete."""
    query(home, "UPDATE receipts SET created_at = 0 WHERE log_entry < 3")

    async def retain(service: ReceiptLog, database: Database) -> None:
        async def late(entries: Sequence[int]) -> Sequence[SqlStatement]:
            if not begun:
                begun.append(True)
                await database.write(("DELETE FROM log_checkpoints", ()))
                await service.histories.begin("A test begins another log.", None)
            return await service.removals(entries)

        begun: list[bool] = []
        for _ in range(2):  # an hour later
            await retention.apply(database, RetentionConfig(receipts="30d"), 10**12, late)

    with_log(home, retain)
    assert query(home, "SELECT count(*) FROM receipts") == [(3,)]
    assert findings(home) == []


def test_proofs_that_are_asked_for_at_once_share_a_checkpoint(home: Path, used: Any) -> None:
    query(home, "DELETE FROM log_checkpoints")

    async def ask(service: ReceiptLog, _database: Database) -> int:
        heard: list[Note] = []
        service.listeners.append(heard.append)
        proofs = await asyncio.gather(*(service.entry_proof(one) for one in used[1]))
        assert [proof.index for proof in proofs if proof is not None] == [0, 1, 2, 3, 4]
        return len(heard)

    assert with_log(home, ask) == 1
