"""Homes that earlier versions wrote open with this one; a backup is made before; no way leads back
but that backup.  `tests/before/make_home` made the homes, with the code of then."""

from __future__ import annotations

import asyncio
import io
import json
import shlex
import shutil
import sqlite3
import stat
import subprocess
import sys
import tarfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

from pinaivu_box import config
from pinaivu_box.backup import archive, before_migration
from pinaivu_box.box_services import open_box
from pinaivu_box.home import lock
from pinaivu_box.receipts.verify import verify_receipt
from pinaivu_box.server.app import create_app
from pinaivu_box.store import migration_backups
from pinaivu_box.store.schema import CURRENT
from tests.support.damage import killed_before
from tests.support.in_process_command import run_command, run_command_json
from tests.support.paths import ROOT
from tests.support.process_box import environment

HOMES = sorted((Path(__file__).parent / "before" / "homes").glob("schema-*.tar.xz"))
OLDEST = HOMES[0]
OLDER = [file for file in HOMES if not file.name.startswith(f"schema-{CURRENT.version}.")]
NEWER = CURRENT.version + 1

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Unpacked(NamedTuple):
    """A home that an earlier version wrote, and what it said of it."""

    home: Path
    facts: dict[str, Any]


def unpacked(file: Path, folder: Path) -> Unpacked:
    home = folder / "home"
    with tarfile.open(file) as packed:
        packed.extractall(home, filter="data")
    return Unpacked(home, json.loads((home / "facts.json").read_text()))


@pytest.fixture(params=HOMES, ids=lambda file: file.name.partition(".")[0])
def each(request: pytest.FixtureRequest, tmp_path: Path) -> Unpacked:
    return unpacked(request.param, tmp_path)


@pytest.fixture
def oldest(tmp_path: Path) -> Path:
    return unpacked(OLDEST, tmp_path).home


def version_of(home: Path) -> int:
    with closing(sqlite3.connect(home / "pinaivu.db")) as database:
        return int(database.execute("PRAGMA user_version").fetchone()[0])


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def backups(home: Path) -> list[Path]:
    return sorted((home / "backups").glob("*"))


def manifest(path: Path) -> archive.Manifest:
    with path.open("rb") as file:
        return archive.read_manifest(file)


def refused(home: Path, *args: str) -> str:
    """The one sentence that a command ends with."""
    done = run_command(*args, home=home, check=False)
    assert done.returncode == 1, done.stdout
    assert done.stderr.startswith("pinaivu: ") and done.stderr.count("\n") == 1, done.stderr
    return done.stderr


@asynccontextmanager
async def served(home: Path) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a box on that home."""

    def load() -> config.Config:
        return config.load(home / "config.toml", environ={})

    async with open_box(load, home) as box:
        transport = httpx.ASGITransport(create_app(box))
        async with httpx.AsyncClient(transport=transport, base_url="http://box") as client:
            yield client


# -- a home of an earlier version ------------------------------------------------------------------


def includes(found: Any, before: Any) -> bool:
    """Whether all that there was is there, perhaps with new fields."""
    if isinstance(before, dict):
        return all(name in found and includes(found[name], before[name]) for name in before)
    if isinstance(before, list):
        return len(found) == len(before) and all(map(includes, found, before))
    return bool(found == before)


def test_there_is_a_home_of_each_version() -> None:
    versions = {int(file.name.split("-")[1].split(".")[0]) for file in HOMES}
    assert versions == set(range(CURRENT.oldest, CURRENT.version + 1)), (
        "run tests/before/make_home with the last commit of the missing version"
    )


def test_keys_and_usage_are_kept(each: Unpacked) -> None:
    assert includes(run_command_json("keys", "ls", home=each.home), each.facts["keys"])
    usage = run_command_json("usage", "--since", "2026-01-01", home=each.home)
    before = each.facts["usage"]
    for told in (usage, before):  # when it was asked
        told.pop("end_date", None)
        told.pop("until", None)
    assert includes(usage, before)


async def test_keys_work_and_receipts_are_in_the_log(each: Unpacked) -> None:
    body = {
        "model": "fake:1", "max_tokens": 8, "seed": 7,
        "messages": [{"role": "user", "content": "Hello!"}],
    }  # fmt: skip
    async with served(each.home) as client:

        async def ask(name: str, path: str, **more: Any) -> httpx.Response:
            key = {"Authorization": f"Bearer {each.facts[name]}"}
            return await client.request("POST" if more else "GET", path, headers=key, **more)

        for name in ("app", "limited", "rotated"):
            answer = await ask(name, "/v1/chat/completions", json=body)
            assert answer.status_code == 200, answer.text
            text = answer.json()["choices"][0]["message"]["content"]
            assert text == each.facts["answers"][0]["choices"][0]["message"]["content"]
        answer = await ask("revoked", "/v1/chat/completions", json=body)
        assert answer.status_code == 401
        for answered in each.facts["answers"]:
            request_id = answered["request_id"]
            document = await ask("admin", f"/v1/receipts/{request_id}")
            signed = json.loads(document.json()["signed_receipt"])
            assert signed["coordinator_id"] == each.facts["node_id"]
            checks = verify_receipt(document.content)
            assert [check.name for check in checks if not check.ok] == []
            async with asyncio.timeout(60):
                while (await ask("admin", f"/v1/log/proof/{request_id}")).status_code != 200:  # noqa: ASYNC110
                    await asyncio.sleep(0.02)
    done = run_command("receipts", "verify", "--all", home=each.home)
    assert "all as they were signed" in done.stdout


# -- the backup ------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", OLDER, ids=lambda file: file.name.partition(".")[0])
def test_a_backup_is_made_before_the_first_migration(file: Path, tmp_path: Path) -> None:
    home, facts = unpacked(file, tmp_path)
    run_command("keys", "ls", home=home)
    assert version_of(home) == CURRENT.version
    (backup,) = backups(home)
    assert backup.name.startswith(f"before-schema-{CURRENT.version}-")
    assert (mode(backup), mode(backup.parent)) == (0o600, 0o700)
    found = manifest(backup)
    assert (found.schema, found.node_id) == (facts["schema"], facts["node_id"])
    run_command("keys", "ls", home=home)
    assert backups(home) == [backup], "of a database that is up to date none is made"
    other = tmp_path / "other"
    run_command("restore", str(backup), home=other)
    assert version_of(other) == facts["schema"]
    assert includes(run_command_json("keys", "ls", home=other), facts["keys"])


def test_a_new_home_is_not_backed_up(tmp_path: Path) -> None:
    run_command("keys", "ls", home=tmp_path / "new")
    assert backups(tmp_path / "new") == []


def test_a_home_without_an_identity_is_backed_up_with_a_new_one(oldest: Path) -> None:
    (oldest / "identity.key").unlink()
    run_command("keys", "ls", home=oldest)
    (backup,) = backups(oldest)
    assert manifest(backup).node_id == run_command_json("id", home=oldest)["node_id"]


def test_the_two_newest_are_kept(oldest: Path) -> None:
    (oldest / "backups").mkdir()
    others = [oldest / "backups" / "before-schema-6-tuesday.backup"]
    others.append(oldest / "backups" / "mine.backup")
    for other in others:
        other.touch()
    made = [before_migration.back_up(oldest, CURRENT.version) for _ in range(4)]
    assert backups(oldest) == sorted([*made[-2:], *others])


def test_a_home_that_cannot_be_backed_up_is_left_as_it_was(
    oldest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = version_of(oldest)
    (oldest / "backups").touch()
    assert "cannot be backed up first" in refused(oldest, "keys", "ls")
    (oldest / "backups").unlink()
    usage = shutil.disk_usage(oldest)._replace(free=1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert "there are 1 MB free" in refused(oldest, "keys", "ls")
    assert version_of(oldest) == before and backups(oldest) == []


def test_a_damaged_database_is_not_migrated(oldest: Path) -> None:
    with closing(sqlite3.connect(oldest / "pinaivu.db")) as database:
        database.execute("UPDATE keys SET account_id = 'acct_nobody'")
        database.commit()
    before = version_of(oldest)
    assert "damaged" in refused(oldest, "keys", "ls")
    assert version_of(oldest) == before and backups(oldest) == []


def test_a_command_does_not_migrate_while_a_server_of_then_runs(oldest: Path) -> None:
    before = version_of(oldest)
    with closing(lock(oldest)):
        assert "stop it before its database is migrated" in refused(oldest, "keys", "ls")
    assert version_of(oldest) == before and backups(oldest) == []


def test_whoever_is_killed_while_the_backup_is_written_begins_again(oldest: Path) -> None:
    """Before each change of the file system, one after another."""
    before, number = version_of(oldest), 1
    while killed_before(number, "keys", "ls", home=oldest):
        number += 1
        assert version_of(oldest) == before
        assert all(manifest(path).schema == before for path in migration_backups.listed(oldest))
    assert number > 5 and version_of(oldest) == CURRENT.version
    assert backups(oldest) == sorted(migration_backups.listed(oldest))
    assert len(backups(oldest)) == 2, "one of the run that was killed last"
    assert not (oldest / "backup.new").exists()


# Runs the command, and kills it when the backup is made and the migration is not committed yet.
KILLED = """
import os, signal
from pinaivu_box.store import schema
migrate = schema._migrate
async def killed(*arguments):
    await migrate(*arguments)
    os.kill(os.getpid(), signal.SIGKILL)
schema._migrate = killed
from pinaivu_box.cli.main import main
main()
"""


def test_whoever_is_killed_in_the_migration_begins_again(oldest: Path) -> None:
    before = version_of(oldest)
    command = [sys.executable, "-c", KILLED, "keys", "ls", "--home", str(oldest)]
    done = subprocess.run(command, capture_output=True, env=environment(PYTHONPATH=str(ROOT)))
    assert done.returncode == -9, done.stderr
    assert version_of(oldest) == before
    (first,) = backups(oldest)
    run_command("keys", "ls", home=oldest)
    assert version_of(oldest) == CURRENT.version
    assert len(backups(oldest)) == 2 and first in backups(oldest)


# -- a downgrade -----------------------------------------------------------------------------------


@pytest.fixture
def newer(tmp_path: Path) -> Path:
    """A home that the next version has migrated."""
    home = unpacked(HOMES[-1], tmp_path).home
    before_migration.back_up(home, NEWER)
    with closing(sqlite3.connect(home / "pinaivu.db")) as database:
        database.execute("CREATE TABLE novelties (id INTEGER PRIMARY KEY)")
        database.execute(f"PRAGMA user_version = {NEWER}")
        database.commit()
    return home


Way = Callable[[Path], str]
WAYS: dict[str, Way] = {
    "serve": lambda home: refused(home, "serve", "--port", "0"),
    "keys": lambda home: refused(home, "keys", "ls"),
    "usage": lambda home: refused(home, "usage"),
    "backup": lambda home: refused(home, "backup", str(home.parent / "file")),
    "receipts verify --all": lambda home: refused(home, "receipts", "verify", "--all"),
    "doctor": lambda home: run_command("doctor", home=home, check=False).stdout,
}


@pytest.mark.parametrize("way", WAYS)
def test_a_downgrade_is_refused_with_what_to_do(newer: Path, way: str) -> None:
    said = " ".join(WAYS[way](newer).split())
    assert "was written by a newer Pinaivu Box" in said
    assert f"schema {NEWER}" in said and f"up to schema {CURRENT.version}" in said
    assert "install the newer version again" in said
    assert "pinaivu restore" in said
    assert version_of(newer) == NEWER


def test_the_command_that_a_refusal_names_leads_back(newer: Path) -> None:
    said = refused(newer, "keys", "ls")
    command = shlex.split(said.rpartition(": ")[2].rstrip().removesuffix("."))
    assert command[:2] == ["pinaivu", "restore"]
    run_command(*command[1:], home=newer)
    assert version_of(newer) == CURRENT.version
    assert run_command_json("keys", "ls", home=newer)


def test_without_a_backup_a_refusal_names_none(newer: Path) -> None:
    shutil.rmtree(newer / "backups")
    assert "restore a backup that this version made" in refused(newer, "keys", "ls")


def test_a_backup_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    home = unpacked(HOMES[-1], tmp_path).home
    file = tmp_path / "newer.backup"
    run_command("backup", str(file), home=home)
    found = manifest(file)
    newer = archive.Manifest("9.9.9", NEWER, found.node_id, found.created, found.parts)
    parts: dict[str, archive.OpenFile] = {
        part.name: io.BytesIO((home / part.name).read_bytes()) for part in found.parts
    }
    with file.open("wb") as out:
        archive.write(out, newer, parts)
    said = refused(tmp_path / "other", "restore", str(file))
    assert "newer Pinaivu Box 9.9.9" in said and f"schema {NEWER}" in said
