"""`pinaivu update`: only what is signed, newer and starts replaces the executable, which is whole
at every moment."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from pinaivu_box import __version__, appended
from pinaivu_box.release import sums
from pinaivu_box.update import versions
from tests.support.in_process_command import run_command
from tests.support.release_server import (
    Answer,
    ReleaseServer,
    content,
    cut_off,
    endless,
    fake_executable,
    name_of,
    redirect,
    release_server,
    status,
    sums_line,
)
from tests.support.systemd_programs import SystemdPrograms

NEWER = "9.8.7"
OLD = fake_executable(__version__)
NO_UNITS = {"XDG_CONFIG_HOME": "/nowhere"}


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ReleaseServer]:
    (tmp_path / "server").mkdir()
    with release_server(tmp_path / "server") as started:
        started.release(NEWER, "cuda")
        key = tmp_path / "key.pem"
        key.write_bytes(started.public_key)
        monkeypatch.setattr(sums, "PUBLIC_KEY", key)
        yield started


@pytest.fixture
def executable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What this process takes itself for."""
    path = tmp_path / "bin/pinaivu"
    path.parent.mkdir()
    path.write_bytes(OLD)
    path.chmod(0o755)
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    monkeypatch.setattr(sys, "executable", str(path))
    return path


def update(
    server: ReleaseServer, *arguments: str, check: bool = True, env: Mapping[str, str] = NO_UNITS
) -> subprocess.CompletedProcess[str]:
    variables = {"PINAIVU_RELEASES": server.url, **env}
    return run_command("update", *arguments, home=None, env=variables, check=check)


def left(executable: Path) -> list[str]:
    return sorted(path.name for path in executable.parent.iterdir())


def test_versions_are_ordered_as_semantic_versioning_says() -> None:
    ordered = "1.0.0-alpha 1.0.0-alpha.1 1.0.0-alpha.beta 1.0.0-beta 1.0.0-beta.2 1.0.0-beta.11"
    ordered += " 1.0.0-rc.1 1.0.0 1.0.1 1.2.0 1.10.0 2.0.0"
    for one, other in zip(ordered.split(), ordered.split()[1:], strict=False):
        assert versions.is_older(one, other) and not versions.is_older(other, one)
    for wrong in ("1.0", "v1.0.0", "1.0.0\n", "1.0.٣", "1.0.0-"):
        with pytest.raises(ValueError):
            versions.rank(wrong)


def test_check_says_what_there_is_and_changes_nothing(
    server: ReleaseServer, executable: Path
) -> None:
    done = update(server, "--check")
    assert NEWER in done.stdout and __version__ in done.stdout
    assert "pinaivu update --apply" in done.stdout
    assert json.loads(update(server, "--check", "--json").stdout) == {
        "current": __version__,
        "newest": NEWER,
        "newer": True,
        "url": f"{server.url}/download/v{NEWER}/{name_of(NEWER)}",
    }
    server.release("0.0.1")
    assert f"{__version__} is the newest version" in update(server, "--check").stdout
    assert left(executable) == ["pinaivu"] and executable.read_bytes() == OLD
    assert all("SHA256SUMS" in path for path in server.asked)


def test_nothing_is_fetched_unless_it_is_asked_for(server: ReleaseServer, executable: Path) -> None:
    assert update(server, check=False).returncode == 2
    update(server, "--help")
    assert server.asked == []


def test_apply_replaces_and_rollback_puts_back(server: ReleaseServer, executable: Path) -> None:
    done = update(server, "--apply")
    assert f"is {NEWER} now" in done.stdout and "restart it" in done.stdout
    previous = executable.with_name("pinaivu.previous")
    assert left(executable) == ["pinaivu", "pinaivu.previous"]
    assert (executable.read_bytes(), previous.read_bytes()) == (fake_executable(NEWER), OLD)
    assert executable.stat().st_mode & 0o777 == 0o755

    done = update(server, "--rollback", "--json")
    assert json.loads(done.stdout)["version"] == __version__
    assert (executable.read_bytes(), previous.read_bytes()) == (OLD, fake_executable(NEWER))
    update(server, "--rollback")
    assert (executable.read_bytes(), previous.read_bytes()) == (fake_executable(NEWER), OLD)


def test_an_update_names_the_services_to_restart(
    server: ReleaseServer, executable: Path, tmp_path: Path
) -> None:
    settings = {"XDG_CONFIG_HOME": str(tmp_path / "settings")}
    environment = {**SystemdPrograms(tmp_path).environment(), **settings}
    link, other = tmp_path / "link", tmp_path / "other"
    link.symlink_to(executable)
    shutil.copy2(executable, other)
    for name, program in (("box", executable), ("linked", link), ("other", other)):
        args = ("install", "--user", "--executable", str(program), "--name", name)
        run_command("service", *args, home=None, env=environment)
    done = update(server, "--apply", env=settings)
    _, _, commands = done.stdout.partition("restart it:\n\n")
    assert [line.strip() for line in commands.splitlines()] == [
        "systemctl --user restart box",
        "systemctl --user restart linked",
    ]
    back = json.loads(update(server, "--rollback", "--json", env=settings).stdout)
    assert back["restart"] == ["systemctl --user restart box", "systemctl --user restart linked"]


def test_what_a_killed_update_has_left_is_removed_by_a_later_one(
    server: ReleaseServer, executable: Path
) -> None:
    old, new = (executable.with_name(f".pinaivu-{letter * 8}") for letter in "ab")
    old.touch()
    new.touch()
    os.utime(old, (0, 0))
    update(server, "--apply")
    assert left(executable) == [new.name, "pinaivu", "pinaivu.previous"]


def test_a_variant_becomes_the_same_variant(
    server: ReleaseServer, executable: Path, tmp_path: Path
) -> None:
    table = json.dumps({"name": "cuda", "files": []}).encode()
    (tmp_path / "payload").write_bytes(len(table).to_bytes(4, "little") + table)
    appended.append(executable, appended.PAYLOAD, tmp_path / "payload")
    update(server, "--apply")
    assert executable.read_bytes() == fake_executable(NEWER, "cuda")


def test_the_newest_is_left_as_it_is(server: ReleaseServer, executable: Path) -> None:
    server.release(__version__)
    assert f"{__version__} is the newest" in update(server, "--apply").stdout
    assert executable.read_bytes() == OLD


def test_an_older_release_is_refused_although_it_is_signed(
    server: ReleaseServer, executable: Path
) -> None:
    server.release("0.0.9")
    done = update(server, "--apply", check=False)
    assert done.returncode == 1 and "older than this" in done.stderr
    assert executable.read_bytes() == OLD


FILE = name_of(NEWER)


@pytest.mark.parametrize(
    ("name", "answer", "sentence"),
    [
        (FILE, content(fake_executable(NEWER) + b"#"), "not the file that was released"),
        (FILE, cut_off(fake_executable(NEWER)), "cannot be fetched"),
        (FILE, content(b"<!DOCTYPE html>"), "not the file that was released"),
        (FILE, status(404), "answers with 404"),
        (FILE, redirect("ftp://example.com/x"), "cannot be fetched"),
        ("SHA256SUMS", endless, "longer than it can be"),
        ("SHA256SUMS", status(500), "answers with 500"),
        ("SHA256SUMS", content(b"<!DOCTYPE html>"), "has no executable for this one"),
        ("SHA256SUMS", content(sums_line(FILE, b"evil").encode()), "not of the release key"),
        ("SHA256SUMS", content(2 * sums_line(FILE, b"evil").encode()), "more than one version"),
        ("SHA256SUMS.sig", content(b"x" * 64), "not of the release key"),
        ("SHA256SUMS.sig", endless, "longer than it can be"),
        ("SHA256SUMS.sig", status(404), "answers with 404"),
    ],
)
def test_what_is_not_as_it_was_released_is_refused(
    server: ReleaseServer, executable: Path, name: str, answer: Answer, sentence: str
) -> None:
    server.instead[name] = answer
    done = update(server, "--apply", check=False)
    assert done.returncode == 1 and sentence in done.stderr, done.stderr
    assert len(done.stderr.removeprefix(f"Downloading {FILE}\n").splitlines()) == 1
    assert left(executable) == ["pinaivu"] and executable.read_bytes() == OLD


@pytest.mark.parametrize(
    ("program", "sentence"),
    [
        (b"#!/bin/sh\necho 'it needs more' >&2; exit 1\n", "does not run here (it needs more)"),
        (fake_executable("9.8.6"), "is 9.8.6, not 9.9.9"),
        (b"no program", "does not run here"),
    ],
)
def test_what_does_not_run_here_is_refused(
    server: ReleaseServer, executable: Path, program: bytes, sentence: str
) -> None:
    server.release("9.9.9", content=program)
    done = update(server, "--apply", check=False)
    assert done.returncode == 1 and sentence in done.stderr
    assert left(executable) == ["pinaivu"] and executable.read_bytes() == OLD


def test_the_executable_is_whole_while_the_new_one_arrives(
    server: ReleaseServer, executable: Path
) -> None:
    during: list[bytes] = []
    asked = threading.Event()

    def answer(request: BaseHTTPRequestHandler) -> None:
        during.append(executable.read_bytes())
        content(fake_executable(NEWER))(request)
        asked.set()

    server.instead[FILE] = answer
    update(server, "--apply")
    assert asked.is_set() and during == [OLD]
    assert executable.read_bytes() == fake_executable(NEWER)


def test_there_is_nothing_to_return_to_before_an_update(
    server: ReleaseServer, executable: Path
) -> None:
    done = update(server, "--rollback", check=False)
    assert done.returncode == 1 and "nothing was updated here" in done.stderr


def test_a_clone_is_updated_by_git(server: ReleaseServer) -> None:
    for option in ("--apply", "--rollback"):
        done = update(server, option, check=False)
        assert done.returncode == 1 and "git pull" in done.stderr
    assert server.asked == []
    assert NEWER in update(server, "--check").stdout


def test_an_installed_package_is_updated_by_pip(
    server: ReleaseServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pinaivu_box.update.executable._CLONE", tmp_path / "pinaivu.spec")
    done = update(server, "--apply", check=False)
    assert done.returncode == 1 and "pip install --upgrade pinaivu-box" in done.stderr


def test_without_a_release_key_nothing_can_be_verified(
    server: ReleaseServer, executable: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sums, "PUBLIC_KEY", tmp_path / "none.pem")
    done = update(server, "--check", check=False)
    assert done.returncode == 1 and "without a release key" in done.stderr
    assert server.asked == []
