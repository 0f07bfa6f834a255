"""The home directory of a box: its database, its key, and the lock of its server."""

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
    """Create the home directory (0700) if it does not exist.  Raises CliError."""
    try:
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
        # The mode of mkdir is subject to the umask, and the directory may be older.
        home.chmod(0o700)
    except OSError as error:
        raise CliError(f"The home {home} cannot be used: {error.strerror}.") from error
    return home


def database_of(home: Path) -> Database:
    return Database(prepare_home(home) / "pinaivu.db")


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
