"""The Hub's cache, which llama.cpp uses: `models--OWNER--REPO/snapshots/COMMIT/FILE.gguf`.

Each file there is a link to one in `blobs`; `refs/main` names the commit that was fetched last.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from pinaivu_box.models import folder_scan, projectors
from pinaivu_box.models.caches import gguf_files
from pinaivu_box.models.caches.cache import CachedModel, inside, read_document
from pinaivu_box.models.folder_scan import FolderScan
from pinaivu_box.models.gguf_bytes import BadGguf

PREFIX = "models--"
_MAX_REPOSITORIES = 10_000
_COMMIT = re.compile("[0-9a-f]{40}")
_MAX_COMMIT_BYTES = 64


def find(root: Path) -> FolderScan:
    """Raises OSError."""
    found = FolderScan()
    with os.scandir(root) as entries:
        names = sorted(
            entry.name
            for entry in islice(entries, _MAX_REPOSITORIES)
            if entry.name.startswith(PREFIX) and entry.is_dir(follow_symlinks=False)
        )
    for name in names:
        try:
            if (snapshot := _snapshot(root, root / name)) is not None:
                more = folder_scan.scan(snapshot, links=False)
                found.files += more.files
                found.not_served |= more.not_served
        except (BadGguf, OSError) as error:
            found.not_served[root / name] = getattr(error, "strerror", None) or str(error)
    return found


def _snapshot(root: Path, repository: Path) -> Path | None:
    """The folder of the commit that was fetched last.  Raises BadGguf, OSError."""
    reference = repository / "refs" / "main"
    if not os.path.lexists(reference):
        return None
    commit = read_document(root, reference, _MAX_COMMIT_BYTES).decode(errors="replace").strip()
    if not _COMMIT.fullmatch(commit):
        raise BadGguf("its refs/main names no commit")
    return inside(root, repository / "snapshots" / commit)


def read(root: Path, files: Sequence[Path], not_served: dict[Path, str]) -> list[CachedModel]:
    """llama.cpp calls a file OWNER/REPO:QUANTISATION."""

    def name_of(path: Path, stem: str) -> str:
        folder = path.relative_to(root).parts[0]
        return gguf_files.of_repository(folder.removeprefix(PREFIX).replace("--", "/"), stem)

    def projector_of(path: Path) -> Path | None:
        """One beside it, or in the folder of the snapshot."""
        snapshot = root.joinpath(*path.relative_to(root).parts[:3])
        names = [str(file.relative_to(snapshot)) for file in files if snapshot in file.parents]
        name = projectors.choose(names, str(path.relative_to(snapshot)))
        return snapshot / name if name else None

    return gguf_files.models(root, files, not_served, name_of, projector_of)
