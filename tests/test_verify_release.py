"""`pinaivu verify-release`: the same verdicts as sha256sum and openssl together."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from pinaivu_box.release import sums
from tests.support.in_process_command import run_command
from tests.support.released_files import ReleasedFiles, released

PROGRAM = "pinaivu-1.2.3-linux-x86_64"


@pytest.fixture
def release(tmp_path: Path) -> ReleasedFiles:
    made = released(tmp_path / "release", {PROGRAM: b"program", "install.sh": b"#!/bin/sh\n"})
    (tmp_path / "key.pem").write_bytes(made.public_key)
    return made


def verify(
    release: ReleasedFiles, *arguments: str | Path, key: str = "key.pem"
) -> subprocess.CompletedProcess[str]:
    options = ["--key", str(release.folder.parent / key), *map(str, arguments)]
    return run_command("verify-release", *options, home=None, check=False)


def test_one_line_says_so_for_each_file(release: ReleasedFiles) -> None:
    files = [release.folder / PROGRAM, release.folder / "install.sh"]
    done = verify(release, *files)
    assert done.returncode == 0
    assert done.stdout.splitlines() == [
        f"{file}: signature and digest are right." for file in files
    ]


def test_a_changed_file_fails_and_the_others_are_still_checked(release: ReleasedFiles) -> None:
    (release.folder / PROGRAM).write_bytes(b"progrom")
    done = verify(release, release.folder / PROGRAM, release.folder / "install.sh")
    first, second = done.stdout.splitlines()
    assert done.returncode == 1 and "not the file that was released" in first
    assert second.endswith(": signature and digest are right.")


def test_a_changed_list_fails_for_every_file(release: ReleasedFiles) -> None:
    """Also if the digest in it was made to fit."""
    other = released(release.folder.parent / "other", {PROGRAM: b"evil"})
    for name in (PROGRAM, sums.SUMS):
        (release.folder / name).write_bytes((other.folder / name).read_bytes())
    done = verify(release, release.folder / PROGRAM, release.folder / sums.SUMS)
    assert done.returncode == 1 and done.stdout.count("not of the release key") == 2


def test_sums_from_elsewhere_and_the_list_itself(release: ReleasedFiles, tmp_path: Path) -> None:
    moved = tmp_path / PROGRAM
    (release.folder / PROGRAM).rename(moved)
    listed = release.folder / sums.SUMS
    assert verify(release, moved, listed, "--sums", listed).returncode == 0
    done = verify(release, moved)
    assert done.returncode == 1 and f"{tmp_path / sums.SUMS} cannot be read" in done.stdout
    renamed = moved.rename(tmp_path / "pinaivu")
    done = verify(release, renamed, "--sums", listed)
    assert done.returncode == 1 and "is not in SHA256SUMS" in done.stdout


def test_what_is_not_there_is_one_sentence(release: ReleasedFiles) -> None:
    done = verify(release, release.folder / PROGRAM, key="no.pem")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "no.pem cannot be read: No such file" in done.stderr
    (release.folder / PROGRAM).unlink()
    done = verify(release, release.folder / PROGRAM, release.folder)
    assert done.returncode == 1 and "cannot be read: No such file" in done.stdout
    (release.folder / sums.SIGNATURE).unlink()
    done = verify(release, release.folder / "install.sh")
    assert done.returncode == 1 and "SHA256SUMS.sig cannot be read" in done.stdout


def test_without_a_release_key_it_asks_for_one(
    release: ReleasedFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And with one, it is the one that comes with the program."""
    program = str(release.folder / PROGRAM)
    monkeypatch.setattr(sums, "PUBLIC_KEY", release.folder / "none.pem")
    done = run_command("verify-release", program, home=None, check=False)
    assert done.returncode == 1 and "--key PUBLIC.pem" in done.stderr
    monkeypatch.setattr(sums, "PUBLIC_KEY", release.folder.parent / "key.pem")
    assert run_command("verify-release", program, home=None).returncode == 0
