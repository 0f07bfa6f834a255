"""A box's home directory: its database, its key, and the lock of whoever runs on it."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import IO

from pinaivu_box import identity as identities
from pinaivu_box.errors import CliError
from pinaivu_box.identity import Identity
from pinaivu_box.store.database import Database


def prepare_home(home: Path) -> Path:
    """Make the home directory (0700) if it is not there."""
    try:
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
        # A mode given to mkdir is subject to the umask, and the directory may be older.
        home.chmod(0o700)
    except OSError as error:
        raise CliError(f"The home {home} cannot be used: {error.strerror}.") from error
    return home


def database_of(home: Path) -> Database:
    return Database(prepare_home(home) / "pinaivu.db")


def identity_of(home: Path) -> Identity:
    return identities.load_or_create(prepare_home(home) / "identity.key")


def lock(home: Path) -> IO[str]:
    """Keeps others off the home until it is closed; CliError if somebody else does."""
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
