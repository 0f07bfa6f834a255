"""Backs a home up before its database is migrated to a newer schema, which cannot be undone."""

from __future__ import annotations

import shutil
from pathlib import Path

from pinaivu_box import identity
from pinaivu_box.backup.archive import DATABASE, IDENTITY
from pinaivu_box.backup.make import make
from pinaivu_box.errors import CliError
from pinaivu_box.store import migration_backups
from pinaivu_box.text import megabytes

_KEPT = 2
_SPARE_BYTES = 16 * 1024 * 1024


def back_up(home: Path, version: int) -> Path:
    """Back up a home whose database is to be migrated to that version, and return the file.  The
    two newest of these files are kept, older ones deleted.

    Raises CliError, DatabaseUnusable.
    """
    _check_space(home)
    # A home that never had a server has no identity yet, and a backup needs one.
    identity.load_or_create(home / IDENTITY)
    folder = home / migration_backups.FOLDER
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        # Of whoever was interrupted: nobody else migrates now, as the database is locked.
        for left in folder.glob("before-schema-*.part"):
            left.unlink(missing_ok=True)
        path = migration_backups.new_path(home, version)
        make(home, path, None, force=False)
        for old in migration_backups.listed(home)[_KEPT:]:
            old.unlink(missing_ok=True)
    except OSError as error:
        raise CliError(_refusal(home, f"{folder} cannot be used: {error.strerror}")) from error
    except CliError as error:
        raise CliError(_refusal(home, error.message.removesuffix("."))) from error
    return path


def _check_space(home: Path) -> None:
    """A backup takes the size of the database once for a snapshot, and once for the file."""
    files = [home / DATABASE, home / f"{DATABASE}-wal"]
    need = 2 * sum(file.stat().st_size for file in files if file.exists()) + _SPARE_BYTES
    if need > (free := shutil.disk_usage(home).free):
        sizes = f"it needs {megabytes(need)} and there are {megabytes(free)} free"
        raise CliError(_refusal(home, sizes))


def _refusal(home: Path, why: str) -> str:
    return (
        f"{home} is of an earlier version and was not changed, because it cannot be backed up "
        f"first ({why})."
    )
