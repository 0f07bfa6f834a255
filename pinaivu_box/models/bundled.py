"""The default model that comes with the program: inside the executable, or beside the package.

In the executable it is appended after PyInstaller's archive at a page boundary, so that its
weights are memory-mapped straight out of the executable and nothing is unpacked.  Layout of the
file's end: padding, GGUF, then a 64-byte footer of magic, offset, size (both little-endian u64),
the SHA-256 of the GGUF and 8 zero bytes.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import struct
import sys
from dataclasses import dataclass
from pathlib import Path

MODEL_ID = "smollm2:135m"
FILE_NAME = "smollm2-135m.gguf"

_MAGIC = b"pnvgguf1"
_FOOTER = struct.Struct("<8sQQ32s8x")
_PAGE = 65536  # a multiple of every page size in use


@dataclass(frozen=True)
class Location:
    """`size` bytes at `offset` of `path`; `digest` is the SHA-256 in hex where it is recorded."""

    path: Path
    offset: int
    size: int
    digest: str | None


def find() -> Location | None:
    """Where the bundled model is, None if this installation has none."""
    if getattr(sys, "frozen", False):
        return read_footer(Path(sys.executable))
    path = Path(sys.prefix) / "share" / "pinaivu" / "models" / FILE_NAME
    if not path.is_file():
        return None
    return Location(path, 0, path.stat().st_size, None)


def read_footer(executable: Path) -> Location | None:
    with executable.open("rb") as file:
        if file.seek(0, os.SEEK_END) < _FOOTER.size:
            return None
        file.seek(-_FOOTER.size, os.SEEK_END)
        magic, offset, size, digest = _FOOTER.unpack(file.read(_FOOTER.size))
    return Location(executable, offset, size, digest.hex()) if magic == _MAGIC else None


def append(executable: Path, gguf: Path) -> Location:
    """Put `gguf` at the end of `executable`, in place of a model that is already there."""
    existing = read_footer(executable)
    temporary = executable.with_name(executable.name + ".new")
    shutil.copy2(executable, temporary)
    with temporary.open("r+b") as out, gguf.open("rb") as source:
        if existing:
            out.truncate(existing.offset)
        out.seek(0, os.SEEK_END)
        offset = -(-out.tell() // _PAGE) * _PAGE
        out.seek(offset)
        shutil.copyfileobj(source, out, 1 << 20)
        size = out.tell() - offset
        source.seek(0)
        digest = hashlib.file_digest(source, "sha256").digest()
        out.write(_FOOTER.pack(_MAGIC, offset, size, digest))
    temporary.replace(executable)
    return Location(executable, offset, size, digest.hex())


if __name__ == "__main__":  # build/binary calls: python -m pinaivu_box.models.bundled EXE GGUF
    where = append(Path(sys.argv[1]), Path(sys.argv[2]))
    print(f"{where.size} bytes at {where.offset}, sha256 {where.digest}", file=sys.stderr)
