"""Finds model files in a folder and its subfolders, within bounds and always in the same order."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

SUFFIX = ".gguf"
MAX_DEPTH = 8  # of folders; LM Studio's PUBLISHER/REPOSITORY/FILE.gguf needs 2
MAX_ENTRIES = 200_000  # files and folders of any kind
MAX_FILES = 10_000  # that are named like models


@dataclass
class FolderScan:
    """`files` are those above others first, then by name.  `not_served` says why what is not among
    them is left out."""

    files: list[Path] = field(default_factory=list)
    not_served: dict[Path, str] = field(default_factory=dict)


def scan(folder: Path) -> FolderScan:
    """Everything that is named like a model.  Folders whose names begin with a dot are passed over,
    and a folder that is reached twice (by links) is looked at once.  A link that leads upwards, to
    what holds the folder that it lies in (as `/` does), is not followed."""
    found = FolderScan()
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
                for entry in _entries(one):
                    entries += 1
                    if entries > MAX_ENTRIES or len(found.files) > MAX_FILES:
                        why = f"it has more than {MAX_FILES:,} model files"
                        if entries > MAX_ENTRIES:
                            why = f"it has more than {MAX_ENTRIES:,} entries"
                        found.not_served[folder] = f"{why}: the rest was not looked at"
                        return found
                    is_folder, is_named_so = _is_folder(entry), _is_named_so(entry.name)
                    if not is_folder and not is_named_so:
                        continue
                    path = one / entry.name
                    if not is_folder:
                        found.files.append(path)
                        continue
                    if is_named_so:
                        found.not_served[path] = "it is a directory, not a regular file"
                    if entry.name.startswith("."):
                        continue
                    if entry.is_symlink() and _leads_upwards(path, folder):
                        found.not_served[path] = (
                            "it is a link to a folder above it: it is not followed"
                        )
                    else:
                        below.append(path)
            except OSError as error:
                found.not_served[one] = f"this folder cannot be read: {error.strerror or error}"
        level = below
        if level and depth == MAX_DEPTH:
            found.not_served[folder] = f"folders more than {MAX_DEPTH} deep were not looked at"
    return found


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """What is in a folder, by name."""
    with os.scandir(folder) as entries:
        some = islice(entries, MAX_ENTRIES + 1)
        return sorted(some, key=lambda entry: os.fsencode(entry.name))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a loop of links: who reads it will say so
        return False


def _is_named_so(name: str) -> bool:
    return name.lower().endswith(SUFFIX)


def _leads_upwards(link: Path, folder: Path) -> bool:
    """Whether it leads to what holds the models folder, or the folder that it lies in; not if it
    stays within the models folder, where each folder is looked at once."""
    target, place, top = (Path(os.path.realpath(one)) for one in (link, link.parent, folder))
    upwards = target in (*place.parents, *top.parents)
    return upwards and not target.is_relative_to(top)
