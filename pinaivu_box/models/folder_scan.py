"""Scans a folder and its subfolders for model files, within bounds and always in the same order."""

from __future__ import annotations

import os
from collections import deque
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

SUFFIX = ".gguf"
MAX_DEPTH = 8  # of folders; LM Studio's PUBLISHER/REPOSITORY/FILE.gguf needs 2
MAX_ENTRIES = 200_000  # files and folders of any kind
MAX_FILES = 10_000  # named like models


@dataclass
class FolderScan:
    """`files` are those above others first, then by name.  `not_served` holds the reasons for
    those that are left out."""

    files: list[Path] = field(default_factory=list)
    not_served: dict[Path, str] = field(default_factory=dict)


def scan(folder: Path, *, suffix: str = SUFFIX, links: bool = True) -> FolderScan:
    """Find everything that is named like a model, or with another `suffix`.  Folders whose names
    begin with a dot are skipped, and a folder that is reached twice (by links) is scanned once.  A
    link that leads to a folder above it (such as `/`) is not followed, nor, without `links`, one to
    any folder."""
    result = FolderScan()
    if not os.path.lexists(folder):
        return result
    seen: set[tuple[int, int]] = set()
    folders, entries = deque([(folder, 0)]), 0
    while folders:
        current, depth = folders.popleft()
        if depth > MAX_DEPTH:
            result.not_served[folder] = f"folders more than {MAX_DEPTH} deep were not looked at"
            break
        try:
            facts = current.stat()
            if (facts.st_dev, facts.st_ino) in seen:
                continue
            seen.add((facts.st_dev, facts.st_ino))
            for entry in _entries(current):
                entries += 1
                if entries > MAX_ENTRIES or len(result.files) > MAX_FILES:
                    why = f"it has more than {MAX_FILES:,} model files"
                    if entries > MAX_ENTRIES:
                        why = f"it has more than {MAX_ENTRIES:,} entries"
                    result.not_served[folder] = f"{why}: the rest was not looked at"
                    return result
                is_folder, has_suffix = _is_folder(entry), entry.name.lower().endswith(suffix)
                if not is_folder and not has_suffix:
                    continue
                path = current / entry.name
                if not is_folder:
                    result.files.append(path)
                    continue
                if suffix and has_suffix:
                    result.not_served[path] = "it is a directory, not a regular file"
                if entry.name.startswith("."):
                    continue
                if entry.is_symlink() and (not links or _leads_upwards(path, folder)):
                    where = "above it" if links else "in the folder of another program"
                    result.not_served[path] = f"it is a link to a folder {where}: not followed"
                else:
                    folders.append((path, depth + 1))
        except OSError as error:
            why = f"this folder cannot be read: {error.strerror or error}"
            result.not_served[current] = why
    return result


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """What is in a folder, by name."""
    with os.scandir(folder) as entries:
        some = islice(entries, MAX_ENTRIES + 1)
        return sorted(some, key=lambda entry: os.fsencode(entry.name))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a loop of links: reading it reports that
        return False


def _leads_upwards(link: Path, folder: Path) -> bool:
    """Whether it leads to what holds the models folder, or the folder that it lies in; not if it
    stays within the models folder, where each folder is looked at once."""
    target, parent, top = (Path(os.path.realpath(path)) for path in (link, link.parent, folder))
    upwards = target in (*parent.parents, *top.parents)
    return upwards and not target.is_relative_to(top)
