"""The default model that comes with the program: appended to the executable, or beside the package.

In the executable its weights are memory-mapped straight out of it, and nothing is unpacked.
"""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from pinaivu_box import appended

MODEL_ID = "smollm2:135m"
FILE_NAME = "smollm2-135m.gguf"


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
    """The model that ends the executable."""
    last = _last(executable)
    return _location(last) if last else None


def append(executable: Path, gguf: Path) -> Location:
    """Put `gguf` at the end of `executable`, in place of a model that is already there."""
    existing = _last(executable)
    temporary = executable.with_name(executable.name + ".new")
    shutil.copy2(executable, temporary)
    if existing:
        with temporary.open("r+b") as out:
            out.truncate(existing.before)
    made = appended.append(temporary, appended.MODEL, gguf)
    temporary.replace(executable)
    return _location(made, executable)


def _last(executable: Path) -> appended.Appended | None:
    found = appended.read(executable)
    return found[0] if found and found[0].mark == appended.MODEL else None


def _location(found: appended.Appended, path: Path | None = None) -> Location:
    return Location(path or found.path, found.offset, found.size, found.digest)
