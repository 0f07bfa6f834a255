"""Finds model files: in the models folder, and in the folders of other programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pinaivu_box.models import folder_scan
from pinaivu_box.models.caches import locations
from pinaivu_box.models.caches.cache import Cache
from pinaivu_box.models.folder_scan import FolderScan


@dataclass
class ModelScan(FolderScan):
    """`files` are those of the models folder, `cached` those of each other folder (see
    `caches.cache.CacheLayout`)."""

    cached: list[tuple[Cache, list[Path]]] = field(default_factory=list)

    @property
    def all_files(self) -> list[Path]:
        return [*self.files, *(path for _, files in self.cached for path in files)]

    def keep(self, files: set[Path]) -> None:
        """Leave out all other files."""
        self.files = [path for path in self.files if path in files]
        self.cached = [
            (cache, [path for path in found if path in files]) for cache, found in self.cached
        ]


def scan(folder: Path, model_caches: Sequence[str] = ()) -> ModelScan:
    """`model_caches` as in the configuration."""
    own = folder_scan.scan(folder)
    found = ModelScan(own.files, own.not_served)
    for cache in locations.caches(model_caches):
        there = cache.find()
        found.cached.append((cache, there.files))
        found.not_served |= there.not_served
    return found
