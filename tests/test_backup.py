"""Backups are made while the box serves, hold all that was acknowledged, and come back whole."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import pty
import random
import shutil
import sqlite3
import stat
import subprocess
import tarfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.damage import corrupt_database, killed_before
from tests.support.fake_model import FAKE, ask_fake_model
from tests.support.in_process_command import run_command, run_command_json
from tests.support.process_box import PINAIVU, Box, environment, wait_until

MakeBox = Callable[..., Box]
ROOT = Path(__file__).parent.parent
PHRASE = "correct horse battery staple\n"
LONG = "# so that a sealed backup has several chunks\n" * 5000


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def refused(*args: str, home: Path, **more: Any) -> str:
    """The one sentence that a command ends with."""
    done = run_command(*args, home=home, check=False, **more)
    assert done.returncode == 1, done.stdout
    assert done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith("pinaivu: ") and "Traceback" not in done.stderr
    return done.stderr


def home_with_a_key(home: Path, name: str) -> Path:
    """A home with an identity, a configuration and one key of that name; no server is on it."""
    run_command("keys", "create", "--name", name, home=home)
    (home / "identity.key").touch(0o600)
    (home / "identity.key").write_text(hashlib.sha256(name.encode()).hexdigest() + "\n")
    (home / "config.toml").write_text(LONG + f'[pricing]\ncurrency = "{name}"\n')
    return home


def contents(home: Path) -> tuple[list[str], str, str]:
    """What makes a home: the names of its keys, its identity, its configuration."""
    keys = [key["name"] for key in run_command_json("keys", "ls", home=home)]
    return keys, (home / "identity.key").read_text(), (home / "config.toml").read_text()


def node_of(home: Path, request_id: str) -> str:
    shown = json.loads(run_command("receipts", "show", request_id, home=home).stdout)
    return str(shown["coordinator_id"])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A home, and its backup, plain and encrypted."""
    folder = tmp_path_factory.mktemp("made")
    home = home_with_a_key(folder / "home", "new")
    found = {"home": home, "plain": folder / "plain", "sealed": folder / "sealed"}
    run_command("backup", str(found["plain"]), home=home)
    run_command("backup", str(found["sealed"]), "--encrypt", home=home, input=PHRASE)
    return found


# -- the whole way ---------------------------------------------------------------------------------


@pytest.mark.parametrize("encrypt", [False, True])
def test_a_backup_under_load_is_the_same_box_elsewhere(
    new_box: MakeBox, tmp_path: Path, encrypt: bool
) -> None:
    box = new_box("--model", f"{FAKE}=fake:1")
    acknowledged: list[str] = []
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            acknowledged.append(ask_fake_model(box))

    workers = [threading.Thread(target=work, daemon=True) for _ in range(8)]
    for worker in workers:
        worker.start()
    wait_until(lambda: len(acknowledged) > 40, "some receipts")
    before = list(acknowledged)
    file = tmp_path / "box.backup"
    options = ["--encrypt"] if encrypt else []
    done = run_command("backup", str(file), *options, "--json", home=box.home, input=PHRASE)
    at_its_end = len(acknowledged)
    wait_until(lambda: len(acknowledged) > at_its_end + 8, "requests after the backup")
    stop.set()
    for worker in workers:
        worker.join(180)

    facts = json.loads(done.stdout)
    assert facts["encrypted"] is encrypt and facts["size"] == file.stat().st_size
    assert [part["name"] for part in facts["parts"]] == ["identity.key", "pinaivu.db"]
    assert mode(file) == 0o600
    assert sorted(path.name for path in file.parent.glob("box.*")) == ["box.backup"]
    assert not (box.home / "backup.new").exists()
    if not encrypt:
        with tarfile.open(file) as tar:  # any tar reads it
            assert tar.getnames()[0] == "manifest.json"
    box.stop()

    copy = Box(tmp_path / "copy", *box.args)
    run_command("restore", str(file), home=copy.home, input=PHRASE)
    assert mode(copy.home) == 0o700
    assert {mode(path) for path in copy.home.iterdir()} == {0o600}
    with contextlib.closing(sqlite3.connect(copy.home / "pinaivu.db")) as connection:
        kept = {row[0] for row in connection.execute("SELECT request_id FROM receipts")}
    assert set(before) <= kept
    for request_id in (before[0], before[len(before) // 2], before[-1]):
        run_command(
            "receipts", "verify", request_id, "--node-key", facts["node_id"], home=copy.home
        )
    copy.key = box.key
    try:
        copy.start()
        later = ask_fake_model(copy)
        assert copy.http("GET", f"/v1/receipts/{before[0]}").status_code == 200
        assert node_of(copy.home, later) == node_of(copy.home, before[0]) == facts["node_id"]
    finally:
        copy.end()


def test_the_configuration_comes_along(made: dict[str, Path], tmp_path: Path) -> None:
    run_command("restore", str(made["plain"]), home=tmp_path / "other")
    assert contents(tmp_path / "other") == contents(made["home"])


def test_aliases_come_along(tmp_path: Path) -> None:
    home, archive = home_with_a_key(tmp_path / "home", "shells"), tmp_path / "archive"
    run_command("cp", "smollm2:135m", "nick", home=home)
    run_command("backup", str(archive), home=home)
    run_command("restore", str(archive), home=tmp_path / "other")
    assert (tmp_path / "other/aliases.json").read_bytes() == (home / "aliases.json").read_bytes()


def test_an_encrypted_backup_shows_nothing(made: dict[str, Path]) -> None:
    data = made["sealed"].read_bytes()
    secret = (made["home"] / "identity.key").read_bytes().strip()
    for word in (b"manifest", b"SQLite", b"pinaivu.db", b"CREATE TABLE", secret):
        assert word in made["plain"].read_bytes()
        assert word not in data


def test_the_terminal_is_asked_twice_for_the_passphrase(
    made: dict[str, Path], tmp_path: Path
) -> None:
    file = tmp_path / "typed"
    command = [*PINAIVU, "backup", str(file), "--encrypt", "--home", str(made["home"])]
    pid, terminal = pty.fork()
    if pid == 0:
        os.execvpe(command[0], command, environment())
    seen = b""
    typed = [b"first try\n", b"a typo\n", PHRASE.encode(), PHRASE.encode()]
    with contextlib.suppress(OSError):  # the end of a terminal
        while data := os.read(terminal, 1024):
            seen += data
            while typed and seen.count(b": ") > seen.count(b"Error: ") + 4 - len(typed):
                os.write(terminal, typed.pop(0))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, seen
    assert PHRASE.strip().encode() not in seen  # nor is it echoed
    run_command("restore", str(file), home=tmp_path / "other", input=PHRASE)


def test_the_passphrase_may_come_from_the_environment(
    made: dict[str, Path], tmp_path: Path
) -> None:
    done = subprocess.run(
        [*PINAIVU, "restore", str(made["sealed"]), "--home", str(tmp_path / "other")],
        env=environment(PINAIVU_BACKUP_PASSPHRASE=PHRASE.strip()),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


# -- what is refused -------------------------------------------------------------------------------


def test_a_file_is_overwritten_only_by_force(made: dict[str, Path], tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    assert "--force" in refused("backup", str(file), home=made["home"])
    assert file.read_text() == "mine"
    run_command("backup", str(file), "--force", home=made["home"])
    assert mode(file) == 0o600
    run_command("restore", str(file), home=tmp_path / "other")


def test_a_backup_that_is_not_possible_is_refused(made: dict[str, Path], tmp_path: Path) -> None:
    file, home = tmp_path / "file", tmp_path / "home"
    assert "There is no box" in refused("backup", str(file), home=home)
    assert not home.exists()
    shutil.copytree(made["home"], home)
    own = str(home / "pinaivu.db")
    assert "name another" in refused("backup", own, "--force", home=home)
    assert "empty" in refused("backup", str(file), "--encrypt", home=home, input="\n")
    assert "ordinary" in refused("backup", "/dev/null", "--force", home=home)
    nowhere = str(tmp_path / "missing/file")
    assert "No such file" in refused("backup", nowhere, home=home)
    corrupt_database(home / "pinaivu.db")
    assert "damaged" in refused("backup", str(file), home=home)
    (home / "identity.key").unlink()
    assert "identity.key" in refused("backup", str(file), home=home)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home"]
    assert not (home / "backup.new").exists()


def test_a_running_box_is_not_replaced(new_box: MakeBox, made: dict[str, Path]) -> None:
    box = new_box("--model", f"{FAKE}=fake:1")
    before = (box.home / "identity.key").read_text()
    assert "running" in refused("restore", str(made["plain"]), "--force", home=box.home)
    assert (box.home / "identity.key").read_text() == before
    ask_fake_model(box)


def test_a_box_is_replaced_only_by_force_and_its_files_are_kept(
    made: dict[str, Path], tmp_path: Path
) -> None:
    home = home_with_a_key(tmp_path / "home", "old")
    before = contents(home)
    assert "--force" in refused("restore", str(made["plain"]), home=home)
    assert contents(home) == before
    aside = Path(run_command_json("restore", str(made["plain"]), "--force", home=home)["aside"])
    assert contents(home) == contents(made["home"])
    assert contents(aside) == before
    again = run_command("restore", str(made["plain"]), "--force", home=home).stdout
    assert "before-restore" in again and str(aside) not in again.split()


def rewritten(plain: Path, change: Callable[[dict[str, Any]], None]) -> bytes:
    """The archive with another manifest, whose digest is right."""
    with tarfile.open(plain) as tar:
        parts = {entry.name: tar.extractfile(entry).read() for entry in tar}  # type: ignore[union-attr]
    manifest = json.loads(parts["manifest.json"])
    change(manifest)
    text = json.dumps(manifest).encode()
    parts["manifest.json"] = text
    digest = hashlib.sha256(text).hexdigest()
    parts["manifest.sha256"] = f"{digest}  manifest.json\n".encode()
    return tar_of(parts)


def tar_of(parts: dict[str, bytes], **more: Any) -> bytes:
    made = b""
    for name, content in parts.items():
        entry = tarfile.TarInfo(name)
        entry.size, entry.mode = len(content), 0o600
        for field, value in more.items():
            setattr(entry, field, value)
        made += entry.tobuf(tarfile.GNU_FORMAT) + content + bytes(-len(content) % 512)
    return made + bytes(1024)


def update(**more: Any) -> Callable[[dict[str, Any]], None]:
    return lambda manifest: manifest.update(more)


def part(number: int, **more: Any) -> Callable[[dict[str, Any]], None]:
    return lambda manifest: manifest["parts"][number].update(more)


def hostile(plain: bytes, sealed: bytes, file: Path) -> dict[str, tuple[bytes, str]]:
    """Name -> the bytes, and words of the refusal."""
    link = tar_of({"manifest.json": b""}, type=tarfile.SYMTYPE, linkname="/etc/passwd")
    zipped = io.BytesIO()
    with tarfile.open(fileobj=zipped, mode="w:gz") as tar:
        tar.addfile(tarfile.TarInfo("manifest.json"))
    traversal = plain.replace(tarfile.TarInfo("identity.key").name.encode(), b"../../../key")
    return {
        "nothing": (b"", "not created by"),
        "text": (b"hello\n" * 1000, "not created by"),
        "zeros": (bytes(10240), "not created by"),
        "another tar": (tar_of({"a": b"b"}), "not created by"),
        "gzip": (zipped.getvalue(), "not created by"),
        "a link": (link, "not created by"),
        "a path outside": (tar_of({"../../evil": b"x" * 600}), "not created by"),
        "a path in a part": (traversal, "damaged"),
        "a path in the manifest": (rewritten(file, part(0, name="../evil")), "../evil"),
        "a huge manifest": (tar_of({"manifest.json": b" " * 99999}), "not created by"),
        "a huge part": (rewritten(file, part(2, size=10**18)), " needs "),
        "a negative part": (rewritten(file, part(2, size=-1)), "manifest"),
        "too short a part": (rewritten(file, part(2, size=512)), "damaged"),
        "a part of another digest": (rewritten(file, part(0, sha256="0" * 64)), "identity.key"),
        "another node": (rewritten(file, update(node_id="node_" + "0" * 64)), "node"),
        "no parts": (rewritten(file, update(parts=[])), "nothing"),
        "a newer schema": (rewritten(file, update(schema=999)), "newer"),
        "a newer format": (rewritten(file, update(format=2)), "newer"),
        "an older schema": (rewritten(file, update(schema=1)), "schema"),
        "a cut plain one": (plain[:-700], "truncated"),
        "a longer plain one": (plain + b"\0", "after its end"),
        "a cut sealed one": (sealed[:-20], "truncated"),
        "one chunk less": (sealed[: 17 + 16 + 16 + 24 + 65536 + 17], "truncated"),
        "only the beginning": (sealed[:30], "truncated"),
        "a longer sealed one": (sealed + b"\0", "modified"),
        "costly limits": (sealed[:33] + (2**40).to_bytes(8, "little") + sealed[41:], "exceeds"),
        "no limits": (sealed[:33] + bytes(16) + sealed[49:], "key cannot be computed"),
    }


def test_a_damaged_or_hostile_backup_is_refused_with_a_sentence(
    made: dict[str, Path], tmp_path: Path
) -> None:
    home = home_with_a_key(tmp_path / "home", "old")
    before = contents(home)
    plain, sealed = made["plain"].read_bytes(), made["sealed"].read_bytes()
    file = tmp_path / "bad"
    for name, (data, words) in hostile(plain, sealed, made["plain"]).items():
        file.write_bytes(data)
        why = refused("restore", str(file), "--force", home=home, input=PHRASE)
        assert words in why, f"{name}: {why}"
    assert "passphrase is wrong" in refused(
        "restore", str(made["sealed"]), "--force", home=home, input="another\n"
    )
    assert "No such file" in refused("restore", str(tmp_path / "none"), home=home)
    assert contents(home) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad", "home"]
    assert not [path for path in home.iterdir() if path.is_dir()]


@pytest.mark.parametrize("form", ["plain", "sealed"])
def test_a_changed_byte_anywhere_is_noticed(
    made: dict[str, Path], tmp_path: Path, form: str
) -> None:
    data = made[form].read_bytes()
    home, file = tmp_path / "home", tmp_path / "bad"
    chance = random.Random(5)
    free_text = made["plain"].read_bytes().index(b'"created"') + 15
    places = [0, 20, free_text, len(data) - 1, *(chance.randrange(len(data)) for _ in range(15))]
    for place in places:
        changed = bytearray(data)
        changed[place] ^= 1 << chance.randrange(8)
        file.write_bytes(changed)
        refused("restore", str(file), home=home, input=PHRASE)
        assert not (home / "pinaivu.db").exists(), place


def test_a_damaged_database_is_not_restored_even_if_its_digest_is_right(
    made: dict[str, Path], tmp_path: Path
) -> None:
    copy = tmp_path / "copy.db"
    shutil.copy(made["home"] / "pinaivu.db", copy)
    corrupt_database(copy)
    with tarfile.open(made["plain"]) as tar:
        parts = {entry.name: tar.extractfile(entry).read() for entry in tar}  # type: ignore[union-attr]
    parts["pinaivu.db"] = copy.read_bytes()
    (tmp_path / "archive").write_bytes(tar_of(parts))
    digest = hashlib.sha256(parts["pinaivu.db"]).hexdigest()
    change = part(2, sha256=digest, size=len(parts["pinaivu.db"]))
    (tmp_path / "archive").write_bytes(rewritten(tmp_path / "archive", change))
    assert "damaged" in refused("restore", str(tmp_path / "archive"), home=tmp_path / "home")
    assert not (tmp_path / "home/pinaivu.db").exists()


# -- kill -9 ---------------------------------------------------------------------------------------


def test_a_restore_killed_anywhere_leaves_the_old_box_or_the_new_one(
    new_box: MakeBox, made: dict[str, Path], tmp_path: Path
) -> None:
    box = new_box("--model", f"{FAKE}=fake:1")
    request_id = ask_fake_model(box)
    box.kill()  # its last commits are in the WAL only
    assert (box.home / "pinaivu.db-wal").stat().st_size > 0
    (box.home / "config.toml").write_text("# old\n")
    old, new = None, contents(made["home"])
    seen: list[tuple[bool, bool]] = []
    for number in range(1, 100):
        home = tmp_path / f"case{number}"
        shutil.copytree(box.home, home)
        was_killed = killed_before(number, "restore", str(made["plain"]), "--force", home=home)
        decided = (home / "restore.ready").exists()
        if decided and (True, True) not in seen:
            served = Box(home).start()  # a server finishes it as well as any command
            assert "An interrupted restore was completed" in served.errors
            assert served.http("GET", "/v1/models", key=box.key).status_code == 401
            assert served.stop() == 0
        found = contents(home)
        if found != new:
            run_command("receipts", "verify", request_id, home=home)
            old = old or found
            assert found == old and not decided
        else:
            (aside,) = home.glob("before-restore-*")
            run_command("receipts", "verify", request_id, home=aside)
            assert not (home / "restore.ready").exists()
        seen.append((was_killed, decided))
        if not was_killed:
            break
        shutil.rmtree(home)
    assert old is not None and (True, True) in seen and not seen[-1][0]


def test_leftovers_of_a_killed_backup_or_restore_do_not_block_the_next(
    made: dict[str, Path], tmp_path: Path
) -> None:
    home, file = tmp_path / "home", tmp_path / "file"
    shutil.copytree(made["home"], home)
    killed = (killed_before(number, "backup", str(file), home=home) for number in range(1, 10))
    assert any(was and (home / "backup.new").exists() for was in killed) and not file.exists()
    run_command("backup", str(file), home=home)
    other = tmp_path / "other"
    killed = (killed_before(number, "restore", str(file), home=other) for number in range(1, 10))
    assert any(was and (other / "restore.new").exists() for was in killed)
    run_command("restore", str(file), home=other)
    assert contents(other) == contents(home)
    assert not list(home.glob("*.new")) and not list(other.glob("*.new"))
