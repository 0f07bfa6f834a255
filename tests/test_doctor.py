"""`pinaivu doctor` on real homes: each check is made to fail once, and says what to do."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pinaivu_box.config import Config
from pinaivu_box.doctor import machine, models
from pinaivu_box.doctor.examine import examine
from pinaivu_box.models import bundled
from tests.support import gguf_files
from tests.support.damage import corrupt_database, killed_before
from tests.support.fake_model import FAKE, ask_fake_model
from tests.support.in_process_command import run_command, run_command_json
from tests.support.process_box import (
    MODEL,
    PINAIVU,
    Box,
    environment,
    wait_until,
)

MakeBox = Callable[..., Box]
NAMES = [
    "home",
    "disk",
    "clock",
    "processors",
    "configuration",
    "port",
    "TLS",
    "identity",
    "database",
    "log",
    "transcripts",
    "models",
    "memory",
    "engine",
    "peering",
    "GPU",
]


def doctor(home: Path, *args: str, prefix: tuple[str, ...] = (), **env: str) -> dict[str, Any]:
    """Check name -> its worst finding; the exit status agrees with the findings."""
    env = {"PINAIVU_PORT": "0", **env}  # so that another test's server does not hold the port
    command = ("doctor", "--json", *args)
    done = (
        subprocess.run(
            [*prefix, *PINAIVU, *command, "--home", str(home)],
            capture_output=True,
            text=True,
            timeout=300,
            env=environment(**env),
        )
        if prefix
        else run_command(*command, home=home, check=False, env=env)
    )
    assert done.stderr == ""
    checks = json.loads(done.stdout)
    order = ["ok", "warning", "failed"]
    worst: dict[str, Any] = {}
    for check in checks:
        before = worst.get(check["name"])
        if before is None or order.index(check["state"]) > order.index(before["state"]):
            worst[check["name"]] = check
        assert bool(check["todo"]) or check["state"] == "ok"
    assert list(worst) == NAMES
    assert done.returncode == int(any(check["state"] == "failed" for check in checks))
    return worst


def failed(found: dict[str, Any]) -> list[str]:
    return [name for name, check in found.items() if check["state"] == "failed"]


@pytest.fixture(scope="module")
def used(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home that has served a request of the real model and one of a fake, and is stopped."""
    box = Box(tmp_path_factory.mktemp("used") / "home", "--model", f"{FAKE}=fake:1").start()
    try:
        assert box.chat(max_tokens=2).status_code == 200
        ask_fake_model(box)
        box.stop()
    finally:
        box.end()
    return box.home


@pytest.fixture
def home(used: Path, tmp_path: Path) -> Path:
    """A copy of it to spoil."""
    shutil.copytree(used, tmp_path / "home")
    return tmp_path / "home"


@pytest.fixture
def model(home: Path) -> Iterator[Path]:
    """The bundled model as a file in the models folder."""
    location = bundled.find()
    assert location
    path = home / "models" / "mine.gguf"
    path.parent.mkdir()
    with location.path.open("rb") as source:
        source.seek(location.offset)
        path.write_bytes(source.read(location.size))
    yield path
    path.unlink(missing_ok=True)


def execute(home: Path, sql: str, *values: Any) -> None:
    with contextlib.closing(sqlite3.connect(home / "pinaivu.db")) as connection, connection:
        connection.execute(sql, values)


# -- all is well -----------------------------------------------------------------------------------


def test_a_home_in_order(home: Path) -> None:
    before = {path.name for path in home.iterdir()} | {"pinaivu.db-wal", "pinaivu.db-shm"}
    found = doctor(home)
    assert failed(found) == []
    assert "as in the newest receipt" in found["identity"]["found"]
    assert "as served before" in found["models"]["found"]
    assert "generated a token" in found["engine"]["found"] and MODEL in found["engine"]["found"]
    assert {path.name for path in home.iterdir()} <= before


def test_a_running_box_is_in_order_and_not_disturbed(new_box: MakeBox) -> None:
    box = new_box("--model", f"{FAKE}=fake:1")
    ask_fake_model(box)
    found = doctor(box.home, PINAIVU_PORT=box.url.rpartition(":")[2])
    assert failed(found) == []
    assert box.url in found["port"]["found"] and "in use by this box" in found["port"]["found"]
    assert [engine["model"] for engine in box.engines()] == [FAKE]
    ask_fake_model(box)


def test_a_home_that_is_not_there_yet_is_not_made(tmp_path: Path) -> None:
    found = doctor(tmp_path / "none")
    assert failed(found) == [] and found["home"]["state"] == "warning"
    assert not (tmp_path / "none").exists()


def test_people_get_a_table(home: Path) -> None:
    (home / "identity.key").chmod(0o644)
    done = run_command("doctor", home=home, check=False)
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    where = next(n for n, line in enumerate(lines) if line.startswith("FAILED"))
    assert "home" in lines[where] and "identity.key" in lines[where]
    assert lines[where + 1].strip().startswith("→ chmod 600")
    todo = lines[where + 1].partition("→ ")[2]
    subprocess.run(["sh", "-ec", todo], check=True)  # what it says to do helps
    assert run_command("doctor", home=home, check=False).stdout.startswith("ok")


# -- each fails once -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "mode", "word"),
    [
        (".", 0o755, "enter"),
        ("identity.key", 0o640, "read"),
        ("pinaivu.db", 0o604, "read"),
        ("config.toml", 0o666, "change"),
    ],
)
def test_permissions(home: Path, name: str, mode: int, word: str) -> None:
    (home / "config.toml").touch(0o600)
    (home / name).chmod(mode)
    found = doctor(home)
    assert failed(found) == ["home"]
    assert word in found["home"]["found"] and "chmod" in found["home"]["todo"]


def test_a_home_that_is_a_file_or_unreadable_is_told_without_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    answer = run_command("doctor", home=tmp_path / "file", check=False)
    assert answer.returncode == 2 and "is a file" in answer.stderr
    for name in ("pinaivu.db", "identity.key", "config.toml", "lock", "run.json", "models"):
        (tmp_path / "home" / name).mkdir(parents=True)  # nothing is what it should be
    (tmp_path / "home").chmod(0o700)
    found = doctor(tmp_path / "home")
    assert {"configuration", "identity", "database"} <= set(failed(found))
    assert "broke" not in json.dumps(found)


def test_a_home_of_another_user(home: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a home away")
    os.chown(home, 12345, 12345)
    found = doctor(home)
    assert failed(found) == ["home"] and "12345" in found["home"]["found"]
    os.chown(home, 0, 0)


def test_leftovers_of_a_killed_restore_are_a_warning(home: Path, tmp_path: Path) -> None:
    run_command("backup", str(tmp_path / "file"), home=home)
    command = ("restore", str(tmp_path / "file"), "--force")
    killed = (killed_before(number, *command, home=home) for number in range(1, 10))
    assert any(was and (home / "restore.new").exists() for was in killed)
    found = doctor(home)
    assert found["home"]["state"] == "warning" and "restore.new" in found["home"]["todo"]


def test_disk_space(home: Path, tmp_path: Path) -> None:
    checks = [machine.space("home", home, free, 100, 1000) for free in (99, 100, 1000)]
    assert [check.state for check in checks] == ["failed", "warning", "ok"]
    small = tmp_path / "small"
    small.mkdir()
    mount = 'mount -t tmpfs -o size=1m none "$0" && exec "$@"'
    prefix = ("unshare", "-rm", "sh", "-c", mount, str(small))
    if subprocess.run([*prefix, "true"], capture_output=True).returncode:
        pytest.skip("this user may not mount: the real thing was not tried")
    found = doctor(small, prefix=prefix)
    assert "disk" in failed(found) and str(small) in found["disk"]["found"]


def test_a_clock_that_was_set_back(home: Path) -> None:
    shown = "2099-01-01T00:00:00.000Z"
    with contextlib.closing(sqlite3.connect(home / "pinaivu.db")) as connection:
        rows = connection.execute("SELECT request_id, signed FROM receipts").fetchall()
    request_id, signed = max(rows)
    receipt = {**json.loads(signed), "timestamp": shown}
    changed = json.dumps(receipt).encode()
    execute(home, "UPDATE receipts SET signed = ? WHERE request_id = ?", changed, request_id)
    found = doctor(home)
    # The same change shows that receipts cannot be changed unnoticed.
    assert failed(found) == ["clock", "identity", "log"]
    assert shown in found["clock"]["found"] and "signature" in found["identity"]["found"]


@pytest.mark.parametrize(("told", "state"), [(True, "ok"), (None, "ok"), (False, "warning")])
def test_a_clock_that_nothing_keeps(
    home: Path, monkeypatch: pytest.MonkeyPatch, told: bool | None, state: str
) -> None:
    assert machine.synchronised() in (True, False, None)
    monkeypatch.setattr(machine, "synchronised", lambda: told)
    assert machine.clock(home, 4e9).state == state


def test_a_taken_port(home: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        found = doctor(home, PINAIVU_PORT=port)
    assert failed(found) == ["port"]
    assert port in found["port"]["found"] and "in use" in found["port"]["found"]
    wait_until(lambda: "free" in doctor(home, PINAIVU_PORT=port)["port"]["found"], "a free port")


def test_a_server_that_does_not_answer(new_box: MakeBox) -> None:
    box = new_box()
    (box.home / "run.json").unlink()
    assert failed(doctor(box.home)) == ["port"]


def test_an_identity_that_is_damaged_missing_or_another_boxs(home: Path) -> None:
    path = home / "identity.key"
    path.write_text("x\n")
    assert failed(doctor(home)) == ["identity"]
    path.write_text("ab" * 32 + "\n")
    found = doctor(home)
    assert failed(found) == ["identity"] and "signed by" in found["identity"]["found"]
    path.unlink()
    found = doctor(home)
    assert failed(found) == ["identity"] and "missing" in found["identity"]["found"]
    assert not path.exists()  # looking does not make one


@pytest.mark.parametrize(
    "text", ["[server\n", "[server]\nprot = 1\n", '[engine]\nkeep_alive = "x"']
)
def test_a_configuration_that_is_not_valid(home: Path, text: str) -> None:
    (home / "config.toml").write_text(text)
    (home / "config.toml").chmod(0o600)
    found = doctor(home)
    assert failed(found) == ["configuration"]
    assert str(home / "config.toml") in found["configuration"]["found"]


def test_a_named_prefix_that_cannot_be_read(home: Path) -> None:
    (home / "config.toml").write_text('[engine]\nshared_prefixes = [{ file = "/none.txt" }]\n')
    (home / "config.toml").chmod(0o600)
    found = doctor(home)
    assert failed(found) == ["configuration"]
    assert "/none.txt cannot be read" in found["configuration"]["found"]


def test_a_damaged_database(home: Path) -> None:
    corrupt_database(home / "pinaivu.db")
    found = doctor(home)
    assert "database" in failed(found) and "restore" in found["database"]["todo"]


def test_a_row_that_refers_to_nothing(home: Path) -> None:
    execute(home, "DELETE FROM keys")
    found = doctor(home)
    assert failed(found) == ["database"] and "refers to none" in found["database"]["found"]


def test_databases_of_others_and_of_tomorrow(home: Path) -> None:
    execute(home, "PRAGMA user_version = 999")
    found = doctor(home)
    assert failed(found) == ["database"] and "newer" in found["database"]["found"]
    execute(home, "PRAGMA application_id = 1")
    assert "no database of Pinaivu Box" in doctor(home)["database"]["found"]
    (home / "pinaivu.db").write_text("hello")
    for name in ("pinaivu.db-wal", "pinaivu.db-shm"):
        (home / name).unlink(missing_ok=True)
    assert "database" in failed(doctor(home))


def test_model_files(home: Path, model: Path) -> None:
    """New, known, changed under its time, changed openly, cut off, and no model at all."""
    found = doctor(home)
    assert failed(found) == []
    box = Box(home)
    box.key = run_command_json("keys", "create", home=home)["key"]
    box.start()
    try:
        assert box.chat(model="mine", max_tokens=1).status_code == 200
    finally:
        box.stop()
    assert failed(doctor(home)) == []

    time = model.stat().st_mtime_ns
    with model.open("r+b") as file:
        file.seek(model.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    os.utime(model, ns=(time, time))
    found = doctor(home)
    assert failed(found) == ["models"] and "is not what was served" in found["models"]["found"]
    os.utime(model)
    found = doctor(home)
    assert found["models"]["state"] == "warning" and "replaced" in found["models"]["found"]

    os.truncate(model, model.stat().st_size // 2)
    os.utime(model, (1e9, 1e9))  # or somebody might still be writing it
    found = doctor(home)
    assert failed(found) == ["models"] and "it is incomplete" in found["models"]["found"]
    model.write_bytes(gguf_files.valid())
    found = doctor(home)
    # It is the smallest: an engine really tries it.
    assert failed(found) == ["engine"] and "could not be loaded" in found["engine"]["found"]
    assert "mine" in found["engine"]["found"]
    model.write_bytes(b"hello")
    found = doctor(home)
    assert failed(found) == ["models"] and "not served" in found["models"]["found"]


def test_a_configured_model_that_is_missing(home: Path) -> None:
    (home / "config.toml").write_text('[[model]]\nname = "gone:1"\npath = "/nowhere.gguf"\n')
    (home / "config.toml").chmod(0o600)
    found = doctor(home)
    assert failed(found) == ["models"] and "gone:1" in found["models"]["found"]
    assert found["engine"]["state"] == "ok"


def test_memory() -> None:
    sizes = [(10, 20, 15), (17, 20, 15), (21, 20, 15)]
    assert [models.fits("m", *each).state for each in sizes] == ["ok", "warning", "failed"]


def test_a_context_that_no_machine_has_memory_for(home: Path) -> None:
    (home / "config.toml").write_text("[engine]\ncontext = 2000000000\n")
    (home / "config.toml").chmod(0o600)
    assert failed(doctor(home)) == ["memory"]


def test_a_check_that_breaks_is_a_check_that_failed(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise KeyError("oops")

    monkeypatch.setattr(machine, "synchronised", broken)
    found = {check.name: check for check in examine(home, Config, lambda _: None)}
    assert found["clock"].state == "failed" and "oops" in found["clock"].found
    assert list(found) == NAMES  # the others were made all the same


def test_doctor_after_restore_elsewhere(home: Path, tmp_path: Path) -> None:
    run_command("backup", str(tmp_path / "file"), home=home)
    run_command("restore", str(tmp_path / "file"), home=tmp_path / "other")
    assert failed(doctor(tmp_path / "other")) == []
    assert run_command_json("keys", "ls", home=tmp_path / "other")
