"""Payloads: unpacked once, checked, and unpacked again if they are not what they were."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pinaivu_box import appended
from pinaivu_box.engine import payload, unpacked
from pinaivu_box.engine.payload import PayloadError
from tests.support.paths import ROOT

CODE, MORE = os.urandom(300_000), b"int f(void) { return 1; }" * 1000


@pytest.fixture
def executable(tmp_path: Path) -> Path:
    """With a payload of two files and a model behind it, as build/binary puts them together."""
    files = tmp_path / "files"
    (files / "stand-in").mkdir(parents=True)
    (files / "libggml-cuda.so").write_bytes(CODE)
    (files / "stand-in/libcublas.so.13").write_bytes(MORE)
    build("make", tmp_path / "cuda.payload", "cuda", files)
    return assembled(tmp_path / "pinaivu", tmp_path / "cuda.payload")


def build(command: str, *arguments: Path | str) -> None:
    script = [sys.executable, str(ROOT / "build/payloads.py"), command, *map(str, arguments)]
    subprocess.run(script, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})


def assembled(executable: Path, *payloads: Path) -> Path:
    program = executable.with_suffix(".program")
    program.write_bytes(os.urandom(1000))
    executable.write_bytes(b"\x7fELF" + os.urandom(1000))
    appended.append(executable, appended.PROGRAM, program)
    model = executable.with_suffix(".gguf")
    model.write_bytes(b"GGUF" + os.urandom(100_000))
    build("assemble", executable, model, *payloads)
    return executable


def unpack(executable: Path, cache: Path) -> Path:
    (one,) = payload.find(executable)
    return unpacked.unpack(one, cache)


def test_files_are_unpacked_for_their_owner_alone(executable: Path, tmp_path: Path) -> None:
    folder = unpack(executable, tmp_path / "cache")
    assert folder.name.startswith("cuda-")
    assert (folder / "libggml-cuda.so").read_bytes() == CODE
    assert (folder / "stand-in/libcublas.so.13").read_bytes() == MORE
    modes = {path.stat().st_mode & 0o077 for path in [folder, *folder.rglob("*")]}
    assert modes <= {0, 0o044}  # the note of what was checked tells nothing
    assert not (folder.stat().st_mode & 0o077)


def test_a_second_time_nothing_is_unpacked(executable: Path, tmp_path: Path) -> None:
    library = unpack(executable, tmp_path / "cache") / "libggml-cuda.so"
    before = library.stat()
    assert unpack(executable, tmp_path / "cache") == library.parent
    assert library.stat().st_ino == before.st_ino


def a_byte(folder: Path) -> None:
    path = folder / "libggml-cuda.so"
    path.chmod(0o700)
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)


def the_end(folder: Path) -> None:
    os.truncate(folder / "libggml-cuda.so", 1000)


def a_file(folder: Path) -> None:
    (folder / "stand-in/libcublas.so.13").unlink()


def a_foreign_one(folder: Path) -> None:
    path = folder / "libggml-cuda.so"
    path.unlink()
    path.write_bytes(os.urandom(300_000))


@pytest.mark.parametrize("damage", [a_byte, the_end, a_file, a_foreign_one])
def test_what_was_damaged_is_unpacked_again(
    executable: Path, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    folder = unpack(executable, tmp_path / "cache")
    damage(folder)
    assert unpack(executable, tmp_path / "cache") == folder
    assert (folder / "libggml-cuda.so").read_bytes() == CODE
    assert (folder / "stand-in/libcublas.so.13").read_bytes() == MORE


def test_what_was_only_touched_is_left(executable: Path, tmp_path: Path) -> None:
    library = unpack(executable, tmp_path / "cache") / "libggml-cuda.so"
    os.utime(library, (1, 1))
    before = library.stat().st_ino
    unpack(executable, tmp_path / "cache")
    assert library.stat().st_ino == before


def test_a_damaged_executable_gives_no_library(executable: Path, tmp_path: Path) -> None:
    (one,) = payload.find(executable)
    content = bytearray(executable.read_bytes())
    place = content.find(CODE[100:132])  # random bytes cannot be compressed
    content[place] ^= 1
    executable.write_bytes(content)
    with pytest.raises(PayloadError, match=r"damaged|cannot be unpacked"):
        unpacked.unpack(one, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("cuda-*"))


def test_a_cache_that_cannot_be_written_is_said(executable: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("")
    with pytest.raises(PayloadError, match=r"cannot be unpacked into .*/cache"):
        unpack(executable, tmp_path / "cache")


def test_what_nobody_used_for_a_month_goes(executable: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    for name in ("cuda-old", "cuda-new"):
        (cache / name).mkdir(parents=True)
    os.utime(cache / "cuda-old", (1, 1))
    folder = unpack(executable, cache)
    assert sorted(cache.iterdir()) == sorted([folder, cache / "cuda-new"])


def test_several_at_once_unpack_it_once(executable: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from pinaivu_box.engine import payload, unpacked\n"
        "(one,) = payload.find(Path(sys.argv[1]))\n"
        "folder = unpacked.unpack(one, Path(sys.argv[2]))\n"
        "print((folder / 'libggml-cuda.so').stat().st_ino)"
    )
    command = [sys.executable, "-c", code, str(executable), str(tmp_path / "cache")]
    running = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) for _ in range(4)
    ]
    inodes = {one.communicate()[0] for one in running}
    assert [one.returncode for one in running] == [0] * 4 and len(inodes) == 1


# -- payloads beside the executable --------------------------------------------------------------


@pytest.fixture
def with_companion(tmp_path: Path) -> Path:
    """An executable with a backend, and beside it a payload with a library that this may need."""
    for name in ("backend", "needed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"lib{name}.so").write_bytes(CODE)
    beside = tmp_path / "pinaivu-cublas.payload"
    build("make", beside, "cublas", tmp_path / "needed")
    build("make", tmp_path / "cuda.payload", "cuda", tmp_path / "backend", beside)
    return assembled(tmp_path / "pinaivu", tmp_path / "cuda.payload")


def names(executable: Path) -> list[str]:
    return [one.table.name for one in payload.find(executable)]


def test_a_payload_beside_the_executable_is_used_if_it_is_there(
    with_companion: Path, tmp_path: Path
) -> None:
    assert names(with_companion) == ["cuda", "cublas"]
    folders = [unpacked.unpack(one, tmp_path / "cache") for one in payload.find(with_companion)]
    assert (folders[1] / "libneeded.so").read_bytes() == CODE
    (tmp_path / "pinaivu-cublas.payload").unlink()
    assert names(with_companion) == ["cuda"]


def test_another_payload_of_that_name_is_refused(with_companion: Path, tmp_path: Path) -> None:
    beside = tmp_path / "pinaivu-cublas.payload"
    (tmp_path / "needed/libneeded.so").write_bytes(b"foreign")
    build("make", beside, "cublas", tmp_path / "needed")
    with pytest.raises(PayloadError, match="another version"):
        payload.find(with_companion)


def test_another_payload_beside_it_is_not_looked_at(executable: Path, tmp_path: Path) -> None:
    build("make", tmp_path / "pinaivu-cublas.payload", "cublas", tmp_path / "files")
    assert names(executable) == ["cuda"]


@pytest.mark.parametrize("payloads", [0, 1])
def test_an_executable_keeps_its_model_behind_its_payloads(
    tmp_path: Path, payloads: int, executable: Path
) -> None:
    from pinaivu_box.models import bundled

    made = assembled(tmp_path / "other", *[tmp_path / "cuda.payload"] * payloads)
    found: Any = bundled.read_footer(made)
    content = made.read_bytes()[found.offset : found.offset + found.size]
    assert content == made.with_suffix(".gguf").read_bytes()
