"""The home directory of a box: its database, its key, and the lock of its server."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
from functools import partial
from pathlib import Path
from typing import IO

from pinaivu_box import identity as identities
from pinaivu_box.errors import CliError
from pinaivu_box.identity import Identity
from pinaivu_box.store.database import Database

log = logging.getLogger("pinaivu.home")


def prepare_home(home: Path) -> Path:
    """Create the home directory (0700) if it does not exist.  Raises CliError."""
    try:
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
        # The mode of mkdir is subject to the umask, and the directory may be older.
        home.chmod(0o700)
    except OSError as error:
        raise CliError(f"The home {home} cannot be used: {error.strerror}.") from error
    return home


def database_of(home: Path, *, locked: bool = False) -> Database:
    """The home's database, which is backed up before it is migrated.  `locked`: the caller has
    locked the home, so that no server runs on it."""
    back_up = partial(_back_up, prepare_home(home), locked)
    return Database(home / "pinaivu.db", back_up=back_up)


def _back_up(home: Path, locked: bool, version: int, target: int) -> None:
    from pinaivu_box.backup.before_migration import back_up  # which most starts do not need

    with contextlib.nullcontext() if locked else contextlib.closing(_lock_to_migrate(home)):
        path = back_up(home, target)
    log.warning(
        "the database of %s is migrated from schema %d to %d; a backup is in %s",
        home, version, target, path,
    )  # fmt: skip


def _lock_to_migrate(home: Path) -> IO[str]:
    try:
        return lock(home)
    except CliError:
        raise CliError(
            f"A box of an earlier version is running on {home}: stop it before its database is "
            "migrated, or use the command of that version."
        ) from None


def identity_of(home: Path) -> Identity:
    return identities.load_or_create(prepare_home(home) / "identity.key")


def lock(home: Path) -> IO[str]:
    """Lock the home until the returned file is closed.  Raises CliError if it is locked."""
    handle = os.open(home / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    file = os.fdopen(handle, "r+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise CliError(
            f"Another box is running on {home}: stop it, or choose another --home."
        ) from error
    return file
