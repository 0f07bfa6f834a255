"""Folders in which other programs keep their models, which are used where they are.

Nothing is ever written there, and no link is followed that leads out of such a folder: whoever may
write to it chooses what is in it, and not what else of this machine is served.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pinaivu_box.models.folder_scan import FolderScan
from pinaivu_box.models.gguf_bytes import BadGguf
from pinaivu_box.models.names import printable
from pinaivu_box.models.record import ModelRecord
from pinaivu_box.models.regular_files import open_regular

OLLAMA, LM_STUDIO, LLAMA_CPP = "ollama", "lm-studio", "llama.cpp"
PROGRAMS = (OLLAMA, LM_STUDIO, LLAMA_CPP)
NO_FOLDER = "there is no such folder"


@dataclass(frozen=True)
class CachedModel:
    """A model of another program: its name there, its files in the order of their parts, and what
    is said about it there."""

    id: str
    files: tuple[Path, ...]
    record: ModelRecord | None = None


class CacheLayout(Protocol):
    """How a program arranges its folder."""

    def find(self, root: Path) -> FolderScan:
        """The files that say what models there are.  Raises BadGguf, OSError."""

    def read(
        self, root: Path, files: Sequence[Path], not_served: dict[Path, str]
    ) -> list[CachedModel]:
        """The models that these files say there are; those that cannot be served are noted."""


@dataclass(frozen=True)
class Cache:
    """A folder of a program; `root` is a path without links."""

    program: str
    root: Path
    layout: CacheLayout

    def find(self) -> FolderScan:
        """See `CacheLayout.find`; what goes wrong is noted."""
        try:
            if not self.root.is_dir():
                raise BadGguf(NO_FOLDER)
            return self.layout.find(self.root)
        except (BadGguf, OSError) as error:
            why = getattr(error, "strerror", None) or str(error)
            return FolderScan(not_served={self.root: f"the models of {self.program}: {why}"})

    def read(self, files: Sequence[Path], not_served: dict[Path, str]) -> list[CachedModel]:
        """See `CacheLayout.read`; what goes wrong is noted."""
        try:
            return self.layout.read(self.root, files, not_served)
        except (BadGguf, OSError) as error:
            not_served.setdefault(self.root, getattr(error, "strerror", None) or str(error))
            return []


def inside(root: Path, path: Path) -> Path:
    """The path without links.  Raises BadGguf if it is not in the folder `root`."""
    real = Path(os.path.realpath(path))
    if not real.is_relative_to(root):
        raise BadGguf(
            f"it leads out of {printable(str(root))}, into {printable(str(real.parent))}: in the "
            "folder of another program such links are not followed"
        )
    return real


def read_document(root: Path, path: Path, max_bytes: int) -> bytes:
    """A small file in the folder `root`.  Raises BadGguf, OSError."""
    with open_regular(inside(root, path)) as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise BadGguf(f"it has more than {max_bytes:,} bytes")
    return data
