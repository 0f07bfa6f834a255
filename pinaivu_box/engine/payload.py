"""Payloads: libraries that came with the executable.

A backend for GPUs is large, and not every machine needs it: it is no part of the program, which is
unpacked at the first start, but is appended to the executable as a payload, which is unpacked when
it is first needed (see `unpacked`).  A payload is

    the length of its table (little-endian u32), the table (JSON), the files (one zstd frame)

and the table has the payload's name, the size and SHA-256 of each file, and the SHA-256 of the
tables of other payloads, files beside the executable, that go with it.  Nothing else that lies
there is ever loaded.  `build/payloads.py` makes them.
"""

from __future__ import annotations

import contextlib
import hashlib
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import msgspec

from pinaivu_box import appended

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

LENGTH = struct.Struct("<I")
_MAX_TABLE_BYTES = 1 << 20
Content = zstd.ZstdFile


class PayloadFile(msgspec.Struct, frozen=True):
    name: str
    size: int
    sha256: str


class Table(msgspec.Struct, frozen=True):
    """`companions`: name of a file beside the executable, a payload -> SHA-256 of its table."""

    name: str
    files: list[PayloadFile]
    companions: dict[str, str] = {}


class PayloadError(Exception):
    """A payload cannot be used; the message says why, as the end of a sentence."""


class Payload:
    """One payload, at an offset of a file; `beside` says that the file is not the executable.
    `digest` is the SHA-256 of its table, and so stands for all that it holds."""

    def __init__(self, path: Path, offset: int, *, beside: bool = False) -> None:
        """Raises PayloadError if there is none."""
        self.path, self._offset, self.beside = path, offset, beside
        with explained(f"{path.name} is damaged"), self._opened() as file:
            table = _read_table(file)
            self.table = msgspec.json.decode(table, type=Table)
        self.digest = hashlib.sha256(table).hexdigest()

    @contextlib.contextmanager
    def content(self) -> Iterator[Content]:
        """Its files, one after another."""
        with self._opened() as file:
            _read_table(file)
            with zstd.open(file) as content:
                yield content

    @contextlib.contextmanager
    def _opened(self) -> Iterator[BinaryIO]:
        with self.path.open("rb") as file:
            file.seek(self._offset)
            yield file


def of_this_program() -> list[Payload]:
    """The payloads of the executable that this process runs.  Raises PayloadError."""
    return find(Path(sys.executable)) if getattr(sys, "frozen", False) else []


def find(executable: Path) -> list[Payload]:
    """The payloads appended to `executable`, and those beside it that they name.  Raises
    PayloadError."""
    found = [
        Payload(executable, one.offset)
        for one in appended.read(executable)
        if one.mark == appended.PAYLOAD
    ]
    return [*found, *(beside for one in found for beside in _companions(one))]


@contextlib.contextmanager
def explained(what: str) -> Iterator[None]:
    """Raises PayloadError, which begins with `what`, for errors of files and of their content."""
    try:
        yield
    except (OSError, EOFError, struct.error, msgspec.MsgspecError, zstd.ZstdError) as error:
        raise PayloadError(f"{what}: {error}") from None


def _companions(payload: Payload) -> Iterator[Payload]:
    for name, digest in payload.table.companions.items():
        path = payload.path.with_name(name)
        if path.is_file():
            companion = Payload(path, 0, beside=True)
            if companion.digest != digest:
                raise PayloadError(f"{name} beside it belongs to another version: remove it")
            yield companion


def _read_table(file: BinaryIO) -> bytes:
    (length,) = LENGTH.unpack(file.read(LENGTH.size))
    return file.read(min(length, _MAX_TABLE_BYTES))
