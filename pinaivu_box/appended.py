"""Files appended to the executable: the program that it unpacks (`build/launcher`), payloads
(`payload`), and the default model.

Each begins at a page boundary, so that it can be memory-mapped, and ends with a footer of 64 bytes:
a mark that says what it is, its offset and size, its SHA-256, and the size that the executable had
before, which old versions left 0 (integers are little-endian u64).  They are found from the end on.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

MODEL, PAYLOAD, PROGRAM = b"pnvgguf1", b"pnvbknd1", b"pnvprog1"  # marks
FOOTER = struct.Struct("<8sQQ32sQ")
_LENGTH = struct.Struct("<I")  # of a payload's table
_PAGE = 65536  # a multiple of every page size in use


@dataclass(frozen=True)
class Appended:
    """`size` bytes at `offset` of `path`; `digest` is their SHA-256 in hex, `before` the size of
    `path` without them and what comes after."""

    path: Path
    mark: bytes
    offset: int
    size: int
    digest: str
    before: int


def program_has_payload() -> bool:
    """Whether this process runs an executable that carries one."""
    frozen = getattr(sys, "frozen", False)
    return frozen and any(one.mark == PAYLOAD for one in read(Path(sys.executable)))


def payload_names(path: Path) -> list[str]:
    """The names of the payloads appended to `path` (`engine/payload.py` describes them)."""
    names = []
    for one in read(path):
        if one.mark == PAYLOAD:
            with path.open("rb") as file:
                file.seek(one.offset)
                (length,) = _LENGTH.unpack(file.read(_LENGTH.size))
                names.append(str(json.loads(file.read(length))["name"]))
    return names


def read(path: Path) -> list[Appended]:
    """The files appended to `path`, the last first."""
    found: list[Appended] = []
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        while one := _read_footer(file, path, end):
            found.append(one)
            end = one.before
    return found


def append(path: Path, mark: bytes, source: Path) -> None:
    """Puts `source` at the end of `path`."""
    with path.open("r+b") as out, source.open("rb") as file:
        before = out.seek(0, os.SEEK_END)
        offset = -(-before // _PAGE) * _PAGE
        out.seek(offset)
        shutil.copyfileobj(file, out, 1 << 20)
        size = out.tell() - offset
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").digest()
        out.write(FOOTER.pack(mark, offset, size, digest, before))


def _read_footer(file: BinaryIO, path: Path, end: int) -> Appended | None:
    """The footer of the file that ends at `end`, None if there is none."""
    if end < FOOTER.size:
        return None
    file.seek(end - FOOTER.size)
    mark, offset, size, digest, before = FOOTER.unpack(file.read(FOOTER.size))
    if (
        mark not in (MODEL, PAYLOAD, PROGRAM)
        or not before <= offset <= offset + size <= end - FOOTER.size
    ):
        return None
    return Appended(path, mark, offset, size, digest.hex(), before or offset)
