"""Where the backups are that were made before migrations, and which one an older program can read.

    HOME/backups/before-schema-8-20261201T050000Z.backup

is what `pinaivu backup` makes; its database is of a version below 8.
"""

from __future__ import annotations

import re
import time
from pathlib import Path

FOLDER = "backups"
_NAME = re.compile(r"before-schema-([0-9]{1,9})-[0-9]{8}T[0-9]{6}Z(-[0-9]{1,9})?\.backup")


def new_path(home: Path, version: int) -> Path:
    """A name that is free, for a backup before the migration to that version."""
    stem = time.strftime(f"before-schema-{version}-%Y%m%dT%H%M%SZ", time.gmtime())
    number, path = 1, home / FOLDER / f"{stem}.backup"
    while path.exists():
        number += 1
        path = path.with_name(f"{stem}-{number}.backup")
    return path


def listed(home: Path) -> list[Path]:
    """Those that there are, the newest first."""
    try:
        found = [each for each in (home / FOLDER).iterdir() if _NAME.fullmatch(each.name)]
        return sorted(found, key=lambda each: (each.stat().st_mtime_ns, each.name), reverse=True)
    except OSError:
        return []


def readable_by(version: int, home: Path) -> Path | None:
    """The newest one for a program that reads schemas up to `version`."""
    for path in listed(home):
        if (found := _NAME.fullmatch(path.name)) and int(found[1]) == version + 1:
            return path
    return None
