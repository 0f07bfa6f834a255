"""`pinaivu update` as a user has it: executables of two signed releases that replace each other,
each in a process of its own, and what may come between."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from tests.support.process_box import environment, wait_until
from tests.support.release_server import ReleaseServer, name_of, release_server
from tests.support.released_files import released
from tests.support.stand_in_executable import stand_in

OLD, NEW = "1.0.0", "1.1.0"


class InstalledRelease:
    """The executable of the old release, where a user has put it."""

    def __init__(self, folder: Path, server: ReleaseServer) -> None:
        self.server, self.key = server, folder / "key.pem"
        self.key.write_bytes(server.public_key)
        self.path = folder / "bin/pinaivu"
        self.path.parent.mkdir()
        self.path.write_bytes(self.executable(OLD))
        self.path.chmod(0o750)
        self.previous = self.path.with_name("pinaivu.previous")
        self.environment = environment(
            PINAIVU_RELEASES=server.url, XDG_CONFIG_HOME=str(folder / "settings")
        )

    def executable(self, version: str, more: str = "") -> bytes:
        return stand_in(version, self.key, more)

    def release(self, version: str, more: str = "") -> None:
        self.server.release(version, content=self.executable(version, more))

    def run(self, *arguments: str, program: Path | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [program or self.path, *arguments],
            capture_output=True, text=True, timeout=120, env=self.environment,
        )  # fmt: skip

    def version(self, program: Path | None = None) -> str:
        return self.run("--version", program=program).stdout.split()[-1]

    def left(self) -> list[str]:
        return sorted(path.name for path in self.path.parent.iterdir())

    def refused(self, *arguments: str, program: Path | None = None) -> str:
        """The sentence with which nothing is changed."""
        before = {path.name: path.read_bytes() for path in self.path.parent.iterdir()}
        done = self.run(*arguments, program=program)
        assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
        assert {path.name: path.read_bytes() for path in self.path.parent.iterdir()} == before
        return done.stderr


@pytest.fixture
def installed(tmp_path: Path) -> Iterator[InstalledRelease]:
    with release_server(tmp_path / "server") as server:
        yield InstalledRelease(tmp_path, server)


def test_two_releases_replace_each_other(installed: InstalledRelease) -> None:
    installed.release(NEW)
    assert f"{NEW} is released; this is {OLD}" in installed.run("update", "--check").stdout
    done = installed.run("update", "--apply")
    assert done.returncode == 0 and f"{installed.path} is {NEW} now" in done.stdout, done.stderr
    assert (installed.version(), installed.version(installed.previous)) == (NEW, OLD)
    assert f"{NEW} is the newest" in installed.run("update", "--apply").stdout

    back = json.loads(installed.run("update", "--rollback", "--json").stdout)
    assert (back["version"], back["previous_version"]) == (OLD, NEW)
    assert (installed.version(), installed.version(installed.previous)) == (OLD, NEW)
    assert installed.left() == ["pinaivu", "pinaivu.previous"]


def test_mode_and_owner_stay_those_of_the_executable(installed: InstalledRelease) -> None:
    if os.geteuid() == 0:
        os.chown(installed.path, 1234, 5678)
    before = installed.path.stat()
    installed.release(NEW)
    for option in ("--apply", "--rollback"):
        assert installed.run("update", option).returncode == 0
        after = installed.path.stat()
        assert after.st_ino != before.st_ino
        assert (after.st_mode, after.st_uid, after.st_gid) == (
            before.st_mode, before.st_uid, before.st_gid,
        )  # fmt: skip


def test_a_release_that_another_key_signed_is_refused(
    installed: InstalledRelease, tmp_path: Path
) -> None:
    installed.release(NEW)
    forged = released(
        tmp_path / "forged", {name_of(NEW): installed.executable(NEW, "echo evil >&2")}
    )
    installed.server.replace(NEW, forged)
    assert "not of the release key" in installed.refused("update", "--apply")
    assert "not of the release key" in installed.refused("update", "--check")


def test_an_older_release_is_refused(installed: InstalledRelease) -> None:
    installed.release("0.9.9")
    assert f"0.9.9, older than this ({OLD})" in installed.refused("update", "--apply")


def test_an_update_that_is_killed_leaves_a_whole_executable(installed: InstalledRelease) -> None:
    """With SIGKILL, in the middle of the download; and the next one succeeds."""
    installed.release(NEW, "#" * 100_000)
    data, goes_on = installed.executable(NEW, "#" * 100_000), threading.Event()

    def half(request: BaseHTTPRequestHandler) -> None:
        request.send_response(200)
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        request.wfile.write(data[: len(data) // 2])
        request.wfile.flush()
        goes_on.wait(120)
        request.close_connection = True

    installed.server.instead[name_of(NEW)] = half
    updating = subprocess.Popen(
        [installed.path, "update", "--apply"], env=installed.environment, stderr=subprocess.PIPE
    )
    try:
        wait_until(lambda: len(installed.left()) == 2, "the new file is begun")
        assert updating.poll() is None
    finally:
        updating.kill()
        updating.communicate()
        goes_on.set()
    assert (installed.version(), installed.path.read_bytes()) == (OLD, installed.executable(OLD))
    del installed.server.instead[name_of(NEW)]
    assert installed.run("update", "--apply").returncode == 0
    assert installed.version() == NEW


MOUNT = ["unshare", "--mount", "--map-root-user", "sh", "-c"]


@pytest.mark.skipif(
    shutil.which("unshare") is None
    or subprocess.run([*MOUNT, "mount -t tmpfs none /mnt"], capture_output=True).returncode != 0,
    reason="no file system can be mounted here",
)
def test_a_full_disk_is_one_sentence_and_leaves_nothing(installed: InstalledRelease) -> None:
    installed.release(NEW, "#" * 2_000_000)
    bin = installed.path.parent
    script = f"""
        cp {installed.path} {bin}.copy && mount -t tmpfs -o size=256k none {bin} || exit 99
        cp {bin}.copy {installed.path} && chmod 750 {installed.path}
        {installed.path} update --apply; echo "status $?"
        ls -A {bin}; {installed.path} --version
    """
    done = subprocess.run(
        [*MOUNT, script], capture_output=True, text=True, timeout=120, env=installed.environment
    )
    assert done.stdout.splitlines() == ["status 1", "pinaivu", f"pinaivu, version {OLD}"]
    said = done.stderr.splitlines()
    assert len(said) == 2 and "No space left on device" in said[1], done.stderr


def test_a_release_that_does_not_start_is_not_installed(installed: InstalledRelease) -> None:
    installed.release(NEW, "echo 'it needs more than this system has' >&2; exit 1")
    assert "it needs more than this system has" in installed.refused("update", "--apply")


def test_the_version_before_puts_itself_back(installed: InstalledRelease) -> None:
    """A release that says its version, and can do nothing else, cannot be asked to."""
    installed.release(NEW, 'test "$1" = --version || { echo broken >&2; exit 1; }')
    assert installed.run("update", "--apply").returncode == 0
    assert installed.run("update", "--rollback").stderr == "broken\n"
    before = installed.previous
    assert "the version before an update" in installed.refused("update", "--apply", program=before)
    done = installed.run("update", "--rollback", program=before)
    assert f"{installed.path} is {OLD} now" in done.stdout, done.stderr
    assert (installed.version(), installed.version(before)) == (OLD, NEW)
    assert installed.left() == ["pinaivu", "pinaivu.previous"]
