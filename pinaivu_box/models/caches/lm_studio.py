"""LM Studio's folder: `PUBLISHER/REPOSITORY/FILE.gguf`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pinaivu_box.models import folder_scan
from pinaivu_box.models.caches import gguf_files
from pinaivu_box.models.caches.cache import CachedModel
from pinaivu_box.models.folder_scan import FolderScan
from pinaivu_box.models.names import with_tag


def find(root: Path) -> FolderScan:
    return folder_scan.scan(root, links=False)


def read(root: Path, files: Sequence[Path], not_served: dict[Path, str]) -> list[CachedModel]:
    """LM Studio calls a file PUBLISHER/REPOSITORY@QUANTISATION; ids have a colon there."""

    def name_of(path: Path, stem: str) -> str:
        publisher, *folders = path.relative_to(root).parts[:-1] or ("",)
        if not folders:
            return with_tag(stem)
        return gguf_files.of_repository(f"{publisher}/{folders[0]}", stem)

    return gguf_files.models(root, files, not_served, name_of)
