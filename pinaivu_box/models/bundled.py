"""The default model that comes with the program: appended to the executable, or beside the package.

In the executable its weights are memory-mapped straight out of it, and nothing is unpacked.
"""

from __future__ import annotations

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
    last = next(iter(appended.read(executable)), None)
    if last is None or last.mark != appended.MODEL:
        return None
    return Location(executable, last.offset, last.size, last.digest)
