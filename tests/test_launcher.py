"""The launcher of the executable: it unpacks a program once, only where nobody else can write, and
again if anything of it is missing or was changed.  Here the program is a shell script."""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.build_scripts import build_module
from tests.support.paths import ROOT

SCRIPT = """#!/bin/sh
echo "${0%/pinaivu} $PINAIVU_LAUNCHED"
cat "${0%/*}/data/text"
[ -z "$WAIT" ] || read -r line
exit 3
"""
FRESH, KEPT = "1", "0"
pytestmark = pytest.mark.timeout(600)  # the first compiles the launcher: a few seconds


@pytest.fixture(scope="module")
def executable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The launcher with a program of a script, two files, a folder and a link."""
    folder = tmp_path_factory.mktemp("program")
    (folder / "data/empty").mkdir(parents=True)
    (folder / "data/text").write_text("here\n")
    (folder / "data/large").write_bytes(os.urandom(3_000_000))
    (folder / "data/link").symlink_to("text")
    (folder / "pinaivu").write_text(SCRIPT)
    return make(folder, tmp_path_factory.mktemp("executable") / "pinaivu")


def make(folder: Path, target: Path) -> Path:
    with build_module("launcher") as launcher, build_module("environment") as environment:
        compiled = launcher.launcher(environment.cache())
    script = [sys.executable, ROOT / "build/program.py", target, compiled, folder]
    subprocess.run(script, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    return target


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


class Started:
    """What the script said: where it is, whether that was unpacked for it, and the executable."""

    def __init__(self, done: subprocess.CompletedProcess[str]) -> None:
        assert done.returncode == 3, done.stderr
        first, second = done.stdout.splitlines()
        path, launched = first.split(" ", 1)
        self.folder = Path(path)
        self.fresh, self.lock, self.executable = launched.split(":", 2)
        assert second == "here"


def run(executable: Path, **env: object) -> subprocess.CompletedProcess[str]:
    variables = {name: str(value) for name, value in env.items()}
    return subprocess.run(
        [executable],
        env={"PATH": os.defpath, **variables},
        capture_output=True,
        text=True,
        timeout=60,
    )


def start(executable: Path, **env: object) -> Started:
    return Started(run(executable, **env))


def test_it_unpacks_once_and_runs_from_there(executable: Path, cache: Path) -> None:
    first = start(executable, XDG_CACHE_HOME=cache)
    assert first.folder.parent == cache / "pinaivu"
    assert first.executable == str(executable)
    assert (first.fresh, start(executable, XDG_CACHE_HOME=cache).fresh) == (FRESH, KEPT)
    assert stat.S_IMODE(first.folder.stat().st_mode) == 0o700
    assert (first.folder / "data/link").readlink() == Path("text")
    assert (first.folder / "data/empty").is_dir()
    assert stat.S_IMODE((first.folder / "data/text").stat().st_mode) == 0o400
    assert [path.name for path in (cache / "pinaivu").iterdir()] == [first.folder.name]


def test_the_cache_is_the_user_s(executable: Path, tmp_path: Path) -> None:
    assert start(executable, HOME=tmp_path).folder.parent == tmp_path / ".cache/pinaivu"


@pytest.mark.parametrize("harm", ["remove", "shorten", "rewrite", "rename"])
def test_what_is_not_as_it_was_unpacked_is_unpacked_again(
    executable: Path, cache: Path, harm: str
) -> None:
    folder = start(executable, XDG_CACHE_HOME=cache).folder
    text = folder / "data/text"
    if harm == "remove":
        text.unlink()
    elif harm == "rename":
        text.parent.rename(folder / "other")
    else:
        text.chmod(0o600)
        text.write_text("her\n" if harm == "shorten" else "HERE\n")
    assert start(executable, XDG_CACHE_HOME=cache).fresh == FRESH
    assert start(executable, XDG_CACHE_HOME=cache).fresh == KEPT


def test_starts_at_the_same_time_share_one_folder(executable: Path, cache: Path) -> None:
    with ThreadPoolExecutor(8) as threads:
        started = list(threads.map(lambda _: start(executable, XDG_CACHE_HOME=cache), range(8)))
    assert len({one.folder for one in started}) == 1
    assert [path.name for path in (cache / "pinaivu").iterdir()] == [started[0].folder.name]


def test_one_that_runs_holds_a_lock_on_its_folder(executable: Path, cache: Path) -> None:
    """So that whoever removes unused folders sees it; and what is being removed is not used."""
    folder = start(executable, XDG_CACHE_HOME=cache).folder
    handle = os.open(folder, os.O_RDONLY)
    with subprocess.Popen(
        [executable],
        env={"PATH": os.defpath, "XDG_CACHE_HOME": str(cache), "WAIT": "yes"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout and process.stdout.readline()
        with pytest.raises(BlockingIOError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        process.communicate(b"go on\n")
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert start(executable, XDG_CACHE_HOME=cache).fresh == FRESH
    os.close(handle)


def test_a_folder_that_others_can_write_to_is_not_used(
    executable: Path, cache: Path, tmp_path: Path
) -> None:
    fallback = tmp_path / "tmp"
    fallback.mkdir()
    for folder, mode in [
        (cache / "pinaivu", 0o777),
        (cache / "pinaivu", 0o720),
        (cache, 0o777),
    ]:
        (cache / "pinaivu").mkdir(parents=True, exist_ok=True)
        folder.chmod(mode)
        started = start(executable, XDG_CACHE_HOME=cache, TMPDIR=fallback)
        assert started.folder.parent == fallback / f"pinaivu-{os.geteuid()}"
        assert not list((cache / "pinaivu").iterdir())
        cache.chmod(0o700)
        (cache / "pinaivu").chmod(0o700)
    cache.chmod(0o1777)  # as /tmp: nobody can replace what is another's there
    assert start(executable, XDG_CACHE_HOME=cache).folder.parent == cache / "pinaivu"


def test_a_link_in_the_place_of_the_folder_is_not_followed(
    executable: Path, cache: Path, tmp_path: Path
) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "tmp").mkdir()
    cache.mkdir()
    (cache / "pinaivu").symlink_to(tmp_path / "elsewhere")
    started = start(executable, XDG_CACHE_HOME=cache, TMPDIR=tmp_path / "tmp")
    assert started.folder.parent.parent == tmp_path / "tmp"
    assert not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files to others")
def test_what_another_user_has_put_there_is_not_run(
    executable: Path, cache: Path, tmp_path: Path
) -> None:
    folder = start(executable, XDG_CACHE_HOME=cache).folder
    os.chown(folder / "pinaivu", 12345, 12345)
    assert start(executable, XDG_CACHE_HOME=cache).fresh == FRESH
    os.chown(cache / "pinaivu", 12345, 12345)
    (tmp_path / "tmp").mkdir()
    started = start(executable, XDG_CACHE_HOME=cache, TMPDIR=tmp_path / "tmp")
    assert started.folder.parent.parent == tmp_path / "tmp"


def test_a_cache_that_cannot_be_made_is_no_obstacle(executable: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "tmp").mkdir()
    for env in ({"XDG_CACHE_HOME": tmp_path / "file"}, {"HOME": "/proc"}, {"HOME": "relative"}, {}):
        started = start(executable, TMPDIR=tmp_path / "tmp", **env)
        assert started.folder.parent == tmp_path / f"tmp/pinaivu-{os.geteuid()}"


def run_with_mounts(executable: Path, *mounts: str) -> subprocess.CompletedProcess[str]:
    """With file systems of its own in the place of folders (FOLDER:OPTIONS), and no home."""
    commands = [
        f"mount -t tmpfs -o {one.partition(':')[2]} none {one.partition(':')[0]}" for one in mounts
    ]
    with executable.open("rb") as file:  # its path may be below one of them
        command = " && ".join([*commands, f"exec /proc/self/fd/{file.fileno()}"])
        return subprocess.run(
            ["unshare", "--map-root-user", "--mount", "sh", "-c", command],
            env={"PATH": os.defpath},
            pass_fds=[file.fileno()],
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip


CAN_MOUNT = not subprocess.run(
    ["unshare", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "none", "/tmp"],
    capture_output=True,
).returncode


@pytest.mark.skipif(not CAN_MOUNT, reason="no mount namespaces here")
def test_a_file_system_without_programs_is_passed_over(executable: Path) -> None:
    done = run_with_mounts(executable, "/tmp:mode=1777,noexec", "/var/tmp:mode=1777")
    assert Started(done).folder.parent == Path("/var/tmp/pinaivu-0")
    done = run_with_mounts(executable, "/tmp:noexec", "/var/tmp:ro")
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert "/tmp/pinaivu-0 (mounted with noexec)" in done.stderr
    assert "/var/tmp/pinaivu-0 (Read-only file system)" in done.stderr


@pytest.mark.skipif(not CAN_MOUNT, reason="no mount namespaces here")
def test_what_is_unpacked_already_needs_no_disk_that_can_be_written(executable: Path) -> None:
    """As in a container image."""
    command = """
        mount -t tmpfs -o mode=0755 none /var/tmp
        "$0"
        mount -o remount,ro /var/tmp
        mount -t tmpfs -o ro none /tmp
        exec "$0"
        """
    with executable.open("rb") as file:  # its path may be below /tmp
        done = subprocess.run(
            ["unshare", "-r", "-m", "sh", "-c", command, f"/proc/self/fd/{file.fileno()}"],
            env={"PATH": os.defpath, "XDG_CACHE_HOME": "/var/tmp"},
            pass_fds=[file.fileno()],
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
    assert done.returncode == 3, done.stderr
    first, _, second, _ = done.stdout.splitlines()
    assert "/var/tmp/pinaivu/program-" in first and f" {FRESH}:" in first
    assert second.partition(" ")[0] == first.partition(" ")[0] and f" {KEPT}:" in second


@pytest.mark.skipif(not CAN_MOUNT, reason="no mount namespaces here")
def test_where_there_is_no_safe_folder_it_takes_one_of_its_own(executable: Path) -> None:
    """As in a container whose volumes anybody may write to."""
    done = run_with_mounts(executable, "/tmp:mode=0777", "/var/tmp:mode=0777")
    assert Started(done).folder.parent == Path("/tmp/pinaivu-0")
    done = run_with_mounts(executable, "/tmp:mode=0777", "/var/tmp:mode=1777")
    assert Started(done).folder.parent == Path("/var/tmp/pinaivu-0")


def test_a_full_disk_leaves_nothing_behind(executable: Path, cache: Path, tmp_path: Path) -> None:
    """Here the disk is a limit on the size of files."""
    (tmp_path / "tmp").mkdir()
    limited = ["/bin/sh", "-c", f'trap "" XFSZ; ulimit -f 1000; exec "{executable}"']
    env = {"PATH": os.defpath, "XDG_CACHE_HOME": str(cache), "TMPDIR": str(tmp_path / "tmp")}
    done = subprocess.run(limited, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.startswith("pinaivu: the executable cannot be unpacked anywhere: ")
    assert f"{cache}/pinaivu (File too large)" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not list((cache / "pinaivu").iterdir())


@pytest.mark.parametrize("damage", ["truncated", "content"])
def test_a_damaged_executable_says_so(
    executable: Path, cache: Path, tmp_path: Path, damage: str
) -> None:
    copy = tmp_path / "copy"
    data = bytearray(executable.read_bytes())
    if damage == "truncated":
        del data[-100:]
    else:
        data[-1_000_000] ^= 1
    copy.write_bytes(data)
    copy.chmod(0o755)
    done = run(copy, XDG_CACHE_HOME=cache)
    assert done.returncode == 1 and "get it again" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not cache.exists() or not list((cache / "pinaivu").iterdir())


def test_what_was_appended_does_not_matter_to_it(
    executable: Path, cache: Path, tmp_path: Path
) -> None:
    from pinaivu_box import appended

    copy = tmp_path / "copy"
    shutil.copy2(executable, copy)
    (tmp_path / "model").write_bytes(os.urandom(100_000))
    appended.append(copy, appended.PAYLOAD, tmp_path / "model")
    appended.append(copy, appended.MODEL, tmp_path / "model")
    first = start(executable, XDG_CACHE_HOME=cache)
    second = start(copy, XDG_CACHE_HOME=cache)
    assert (second.folder, second.fresh, second.executable) == (first.folder, KEPT, str(copy))


# -- what other versions have unpacked, which the hook removes ---


@pytest.fixture
def remove_unused() -> Iterator[object]:
    source = (ROOT / "build/executable_hook.py").read_text()
    names: dict[str, object] = {}
    exec(source.rpartition("\nmain()")[0], names)
    yield names["remove_unused"]


def test_only_folders_that_nobody_runs_from_are_removed(
    tmp_path: Path, remove_unused: object
) -> None:
    assert callable(remove_unused)
    ours, used, unused = (tmp_path / f"program-{digit * 24}" for digit in "123")
    unfinished, abandoned = tmp_path / ".new-1-a", tmp_path / ".new-2-b"
    others = [tmp_path / "backends", tmp_path / "program-other"]
    for folder in (ours, used, unused, unfinished, abandoned, tmp_path / ".old-3-c", *others):
        (folder / "data").mkdir(parents=True)
        (folder / "data/file").touch(mode=0o400)
    (tmp_path / f"program-{'4' * 24}").symlink_to(others[0])
    long_ago = time.time() - 86400
    os.utime(abandoned, (long_ago, long_ago))
    handle = os.open(used, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_SH)
    remove_unused(ours)
    os.close(handle)
    left = {path.name for path in tmp_path.iterdir() if not path.is_symlink()}
    assert left == {path.name for path in (ours, used, unfinished, *others)}
    assert all((folder / "data/file").exists() for folder in others)
