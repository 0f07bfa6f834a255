"""A database that was edited behind the box's back: the next start says so, and so do `doctor` and
`receipts verify --all`.  A box never signs what contradicts what it has signed."""

from __future__ import annotations

import contextlib
import json
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pinaivu_box.log import checkpoint, entry_proof, note, restart
from pinaivu_box.log.checkpoint import Checkpoint
from pinaivu_box.log.entry_proof import entry_of
from pinaivu_box.log.restart import Restart, SignedRestart
from tests.support.fake_model import FAKE, ask_fake_model
from tests.support.in_process_command import run_command
from tests.support.process_box import Box

ARGUMENTS = ("--model", f"{FAKE}=fake:0")
Edit = Callable[[sqlite3.Connection], Any]


def started(home: Path) -> Iterator[Box]:
    box = Box(home, *ARGUMENTS).start()
    try:
        yield box
    finally:
        box.end()


running = contextlib.contextmanager(started)


@pytest.fixture(scope="module")
def used(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], str]:
    """A home with the receipts of six requests, which is stopped; their ids, and its key."""
    home = tmp_path_factory.mktemp("log") / "home"
    with running(home) as box:
        ids = [ask_fake_model(box) for _ in range(6)]
        assert box.http("GET", "/v1/log/checkpoint").status_code == 200
        box.stop()
    return home, ids, box.key


@pytest.fixture
def home(used: tuple[Path, list[str], str], tmp_path: Path) -> Path:
    """A copy of it to spoil."""
    shutil.copytree(used[0], tmp_path / "home")
    return tmp_path / "home"


@pytest.fixture
def ids(used: tuple[Path, list[str], str]) -> list[str]:
    return used[1]


def edit(home: Path, *statements: tuple[str, tuple[Any, ...]]) -> None:
    """Without the triggers that forbid it."""
    with contextlib.closing(sqlite3.connect(home / "pinaivu.db")) as connection, connection:
        triggers = connection.execute(
            "SELECT name, sql FROM sqlite_schema WHERE type = 'trigger' AND name LIKE 'log_%'"
        ).fetchall()
        for name, _ in triggers:
            connection.execute(f"DROP TRIGGER {name}")
        for statement in statements:
            connection.execute(*statement)
        for _, sql in triggers:
            connection.execute(sql)


def query(home: Path, sql: str, *values: Any) -> list[Any]:
    with contextlib.closing(sqlite3.connect(home / "pinaivu.db")) as connection:
        return connection.execute(sql, values).fetchall()


def doctor(home: Path) -> list[tuple[str, str]]:
    """What it says of the log: states and sentences."""
    done = run_command("doctor", "--json", home=home, check=False, env={"PINAIVU_PORT": "0"})
    checks = [check for check in json.loads(done.stdout) if check["name"] == "log"]
    return [(check["state"], check["found"]) for check in checks]


def verified(home: Path) -> list[str]:
    """What `receipts verify --all` finds, as "kind: clause"."""
    done = run_command("receipts", "verify", "--all", "--json", home=home, check=False)
    found = json.loads(done.stdout)["findings"]
    assert done.returncode == (1 if found else 0)
    return [f"{one['kind']}: {one['message']}" for one in found]


def metric(box: Box, name: str) -> float:
    lines = box.http("GET", "/metrics", key="").text.splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith(f"{name} ")))


def at_start(home: Path, key: str) -> tuple[dict[str, Any], float, str]:
    """The log as it is after a start, the number of findings, and the lines of the server's log."""
    home.with_name(home.name + ".err").unlink(missing_ok=True)
    with running(home) as box:
        box.key = key
        return box.http("GET", "/v1/log").json(), metric(box, "pinaivu_log_findings"), box.errors


def read(signed: str) -> Checkpoint:
    found = note.read(signed)
    said = checkpoint.read(found)
    assert checkpoint.is_signed(found, said)
    return said


def statement(shown: dict[str, Any]) -> Restart:
    """That of the log which goes on, verified."""
    said = restart.read(SignedRestart(**shown["restart"]))
    assert said.origin == shown["origin"]
    return said


def test_a_home_that_nobody_edited(home: Path, used: tuple[Path, list[str], str]) -> None:
    assert doctor(home) == [("ok", "6 entries, 6 receipts, all as they were signed")]
    assert verified(home) == []
    before = read((home / "log.checkpoint").read_text())
    shown, findings, _ = at_start(home, used[2])
    assert (shown["origin"], shown["earlier"], findings) == (before.origin, [], 0)


def test_a_changed_receipt(home: Path, ids: list[str], used: tuple[Path, list[str], str]) -> None:
    ((signed,),) = query(home, "SELECT signed FROM receipts WHERE request_id = ?", ids[4])
    changed = signed.replace(b'"finish_reason":"length"', b'"finish_reason":"lengtj"', 1)
    assert changed != signed
    edit(home, ("UPDATE receipts SET signed = ? WHERE request_id = ?", (changed, ids[4])))
    clause = f"the receipt of {ids[4]} is not the one that was logged"
    assert doctor(home) == [("failed", clause)] and verified(home) == [f"changed: {clause}"]
    shown, findings, lines = at_start(home, used[2])
    assert (findings, shown["earlier"]) == (1, []) and clause in lines


def test_a_receipt_that_was_changed_with_its_entry(
    home: Path, ids: list[str], used: tuple[Path, list[str], str]
) -> None:
    before = read((home / "log.checkpoint").read_text())
    ((signed,),) = query(home, "SELECT signed FROM receipts WHERE request_id = ?", ids[2])
    changed = signed.replace(b'"finish_reason":"length"', b'"finish_reason":"lengtj"', 1)
    edit(
        home,
        ("UPDATE receipts SET signed = ? WHERE request_id = ?", (changed, ids[2])),
        ("UPDATE log_entries SET hash = ? WHERE id = 3", (entry_of(changed),)),
    )
    found = " / ".join(verified(home))
    assert f"unsigned: the receipt of {ids[2]} fails a check" in found
    assert "rewritten: the log with its first 6 entries does not lead to a checkpoint" in found
    assert {state for state, _ in doctor(home)} == {"failed"}
    shown, findings, _ = at_start(home, used[2])
    assert findings >= 1 and shown["origin"] != before.origin
    said = statement(shown)
    assert said.previous_origin == before.origin and said.last_checkpoint is not None
    assert read(said.last_checkpoint) == before and "behind the box's back" in said.reason
    # The five others are proven by the new log; the changed one by none.
    assert shown["size"] == 5
    assert [state for state, _ in doctor(home)] == ["failed", "warning"]
    assert verified(home) == [f"inserted: the receipt of {ids[2]} was never logged"]


def test_a_removed_receipt(home: Path, ids: list[str], used: tuple[Path, list[str], str]) -> None:
    edit(home, ("DELETE FROM receipts WHERE request_id = ?", (ids[1],)))
    clause = "entry 1 has no receipt any more, and the box did not delete it"
    assert doctor(home) == [("failed", clause)] and verified(home) == [f"removed: {clause}"]
    shown, findings, lines = at_start(home, used[2])
    assert (findings, shown["earlier"]) == (1, []) and clause in lines


def test_an_inserted_receipt(home: Path, ids: list[str], used: tuple[Path, list[str], str]) -> None:
    """One that the box has signed, even: of another request."""
    copied = (
        "INSERT INTO receipts SELECT 'req_other', key_id, created_at, signed, signature, opening,"
        " account_id, model, NULL FROM receipts WHERE request_id = ?"
    )
    edit(home, (copied, (ids[0],)))
    clause = "the receipt of req_other was never logged"
    assert doctor(home) == [("failed", clause)] and verified(home) == [f"inserted: {clause}"]
    _, findings, lines = at_start(home, used[2])
    assert findings == 1 and clause in lines


def test_an_inserted_receipt_with_an_entry(
    home: Path, ids: list[str], used: tuple[Path, list[str], str]
) -> None:
    ((signed,),) = query(home, "SELECT signed FROM receipts WHERE request_id = ?", ids[0])
    edit(
        home,
        ("INSERT INTO log_entries (hash) VALUES (?)", (entry_of(signed),)),
        (
            "INSERT INTO receipts SELECT 'req_other', key_id, created_at, signed, signature,"
            " opening, account_id, model, last_insert_rowid() FROM receipts WHERE request_id = ?",
            (ids[0],),
        ),
    )
    clause = f"the receipt of req_other is that of {ids[0]}"
    assert doctor(home) == [("failed", clause)] and verified(home) == [f"unsigned: {clause}"]
    _, findings, lines = at_start(home, used[2])
    assert findings == 1 and clause in lines


TRUNCATED = (
    ("DELETE FROM receipts WHERE log_entry > 3", ()),
    ("DELETE FROM log_entries WHERE id > 3", ()),
)
FORGOTTEN = (
    ("DELETE FROM log_checkpoints WHERE size > 3", ()),
    ("UPDATE sqlite_sequence SET seq = 3 WHERE name = 'log_entries'", ()),
)


@pytest.mark.parametrize("more", [(), FORGOTTEN[1:], FORGOTTEN], ids=["", "sequence", "all"])
def test_a_truncated_log(
    home: Path, more: tuple[Any, ...], used: tuple[Path, list[str], str]
) -> None:
    """However much of the traces is removed: what was shown is in a file beside the database."""
    before = read((home / "log.checkpoint").read_text())
    edit(home, *TRUNCATED, *more)
    assert [state for state, _ in doctor(home)] == ["failed"]
    assert all(one.startswith("rewritten: the log ") for one in verified(home))
    shown, findings, _ = at_start(home, used[2])
    said = statement(shown)
    assert findings >= 1 and said.last_checkpoint is not None
    assert read(said.last_checkpoint) == before
    assert [one["origin"] for one in shown["earlier"]] == [before.origin]
    assert shown["size"] + shown["earlier"][0]["size"] >= 3


def test_a_log_that_was_truncated_and_regrown(
    home: Path, ids: list[str], used: tuple[Path, list[str], str]
) -> None:
    """By another box process, without what was shown: it signs six other entries for the origin."""
    before = (home / "log.checkpoint").read_text()
    edit(home, *TRUNCATED, *FORGOTTEN)
    (home / "log.checkpoint").unlink()
    with running(home) as box:
        box.key = used[2]
        regrown = [ask_fake_model(box) for _ in range(3)]
        forked = read(box.http("GET", "/v1/log/checkpoint").text)
        box.stop()
    assert (forked.origin, forked.size) == (read(before).origin, read(before).size)
    assert forked.root != read(before).root  # whoever has both has evidence
    (home / "log.checkpoint").write_text(before)
    shown, findings, _ = at_start(home, used[2])
    assert findings == 1 and "not those of its checkpoint" in statement(shown).reason
    with running(home) as box:
        box.key = used[2]
        for request_id in regrown:
            receipt = box.http("GET", f"/v1/receipts/{request_id}").json()
            proof = entry_proof.read(receipt["inclusion"])
            assert read(str(proof.note)).origin in (shown["origin"], forked.origin)


def test_a_copy_of_an_older_database_begins_another_log(
    tmp_path: Path, home: Path, used: tuple[Path, list[str], str]
) -> None:
    shutil.copy(home / "pinaivu.db", tmp_path / "older.db")
    with running(home) as box:
        box.key = used[2]
        ask_fake_model(box)
        box.stop()
    last = read((home / "log.checkpoint").read_text())
    assert last.size == 7
    for name in ("pinaivu.db-wal", "pinaivu.db-shm"):
        (home / name).unlink(missing_ok=True)
    shutil.copy(tmp_path / "older.db", home / "pinaivu.db")
    assert doctor(home)[0][0] == "failed"
    shown, findings, _ = at_start(home, used[2])
    assert findings == 1 and shown["origin"] != last.origin
    assert read(statement(shown).last_checkpoint or "") == last


def test_a_forged_record_of_deletions(
    home: Path, ids: list[str], used: tuple[Path, list[str], str]
) -> None:
    ((origin,),) = query(home, "SELECT origin FROM logs")
    said = json.dumps({"entries": [[1, 1]], "origin": origin, "v": 1}).encode()
    edit(
        home,
        ("DELETE FROM receipts WHERE request_id = ?", (ids[1],)),
        ("INSERT INTO log_removals VALUES (1, 1, ?, ?)", (said, bytes(64))),
    )
    assert [one.split(":")[0] for one in verified(home)] == ["forged", "removed"]


def test_a_forged_checkpoint(home: Path) -> None:
    edit(home, ("UPDATE log_checkpoints SET note = replace(note, '=', 'A')", ()))
    assert {one.split(":")[0] for one in verified(home)} == {"forged"}


def test_a_forged_beginning(home: Path, ids: list[str]) -> None:
    """As if the box itself had ended the log before the receipt that was removed."""
    ((first,),) = query(home, "SELECT origin FROM logs")
    later = f"{first[:-13]}{int(first[-13:]) + 1}"
    said = restart.Restart(later.split("/")[2], later, first, None, "2026-01-01T00:00:00Z", "So.")
    edit(
        home,
        ("UPDATE logs SET size = 3", ()),
        ("DELETE FROM receipts WHERE request_id = ?", (ids[4],)),
        ("UPDATE receipts SET log_entry = NULL WHERE log_entry > 3", ()),
        (
            "INSERT INTO logs (origin, first_entry, restart, signature) VALUES (?, 7, ?, ?)",
            (later, msgspec.json.encode(said), bytes(64)),
        ),
    )
    assert "forged: the beginning of a log is not signed by this box" in verified(home)


def test_an_entry_of_what_is_no_receipt(home: Path, ids: list[str]) -> None:
    edit(
        home,
        ("UPDATE receipts SET signed = ? WHERE request_id = ?", (b"{", ids[3])),
        ("UPDATE log_entries SET hash = ? WHERE id = 4", (entry_of(b"{"),)),
    )
    assert f"unsigned: the receipt of {ids[3]} is no receipt that can be read" in verified(home)
    assert ("failed", f"the receipt of {ids[3]} is not signed by this box") in doctor(home)


def test_a_beginning_that_cannot_be_read(home: Path) -> None:
    edit(home, ("UPDATE logs SET restart = ?, signature = ?", (b"\xff", b"")))
    assert doctor(home)  # and no traceback
    assert verified(home) == []  # nothing was before the first log, so nothing had to be said


def test_verify_all_of_another_key(home: Path) -> None:
    other = home / "identity.key"
    other.write_text("11" * 32 + "\n")
    (found,) = verified(home)
    assert found.startswith("forged: the log is that of node_") and "identity.key is" in found


def test_verify_says_what_it_needs(tmp_path: Path) -> None:
    done = run_command("receipts", "verify", home=tmp_path, check=False)
    assert done.returncode == 2 and "--all" in done.stderr
    done = run_command("receipts", "verify", "--all", home=tmp_path, check=False)
    assert done.returncode == 1 and "There is no log of receipts" in done.stderr


def test_verify_all_says_how_much_it_looked_at(home: Path) -> None:
    done = run_command("receipts", "verify", "--all", home=home)
    assert done.stdout == (
        "ok     6 receipts, 6 entries of the log: all as they were signed, and none is missing\n"
    )
