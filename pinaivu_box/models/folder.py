"""Finds model files in a folder and its subfolders, within bounds and always in the same order."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

SUFFIX = ".gguf"
MAX_DEPTH = 8  # of folders; LM Studio's PUBLISHER/REPOSITORY/FILE.gguf needs 2
MAX_ENTRIES = 200_000  # files and folders of any kind
MAX_FILES = 10_000  # that are named like models


@dataclass
class Found:
    """`files` are those above others first, then by name.  `not_served` says why what is not among
    them is left out."""

    files: list[Path] = field(default_factory=list)
    not_served: dict[Path, str] = field(default_factory=dict)


def find(folder: Path) -> Found:
    """Everything that is named like a model.  Folders whose names begin with a dot are passed over,
    and a folder that is reached twice (by links) is looked at once."""
    found = Found()
    if not os.path.lexists(folder):
        return found
    seen: set[tuple[int, int]] = set()
    level, entries = [folder], 0
    for depth in range(MAX_DEPTH + 1):
        below: list[Path] = []
        for one in level:
            try:
                facts = one.stat()
                if (facts.st_dev, facts.st_ino) in seen:
                    continue
                seen.add((facts.st_dev, facts.st_ino))
                for path, is_folder in _entries(one):
                    entries += 1
                    if entries > MAX_ENTRIES or len(found.files) > MAX_FILES:
                        why = f"it has more than {MAX_FILES:,} model files"
                        if entries > MAX_ENTRIES:
                            why = f"it has more than {MAX_ENTRIES:,} entries"
                        found.not_served[folder] = f"{why}: the rest was not looked at"
                        return found
                    if is_folder and not path.name.startswith("."):
                        below.append(path)
                    if is_folder and _is_named_so(path):
                        found.not_served[path] = "it is a directory, not a regular file"
                    elif _is_named_so(path):
                        found.files.append(path)
            except OSError as error:
                found.not_served[one] = f"this folder cannot be read: {error.strerror or error}"
        level = below
        if level and depth == MAX_DEPTH:
            found.not_served[folder] = f"folders more than {MAX_DEPTH} deep were not looked at"
    return found


def _entries(folder: Path) -> Iterator[tuple[Path, bool]]:
    """What is in a folder, by name, and whether it is a folder."""
    with os.scandir(folder) as entries:
        some = islice(entries, MAX_ENTRIES + 1)
        listed = sorted(some, key=lambda entry: os.fsencode(entry.name))
    for entry in listed:
        try:
            is_folder = entry.is_dir()
        except OSError:  # a loop of links: who reads it will say so
            is_folder = False
        yield folder / entry.name, is_folder


def _is_named_so(path: Path) -> bool:
    return path.name.lower().endswith(SUFFIX)
