"""The folder in which engines keep computed prefixes while they are not loaded (see
`engine.prefix_store`)."""

from __future__ import annotations

import hashlib
import logging
import time
from contextlib import suppress
from pathlib import Path

from pinaivu_box.engine.messages import SavedPrefixes
from pinaivu_box.identity import Identity
from pinaivu_box.settings import LiveSettings

log = logging.getLogger("pinaivu.placement")

FOLDER = "prefixes"
_DOMAIN = "pinaivu saved prefixes"
_MAX_AGE_SECONDS = 7 * 86400.0  # since it was used last
_MAX_WRITE_SECONDS = 600.0  # what has not got its name by then never will


def delete_all(home: Path) -> None:
    """Delete what engines have saved: it is computed again where it is needed."""
    with suppress(OSError):
        for path in (home / FOLDER).iterdir():
            with suppress(OSError):
                path.unlink()


class SavedPrefixFolder:
    def __init__(self, home: Path, identity: Identity, settings: LiveSettings) -> None:
        self._folder, self._settings = home / FOLDER, settings
        self._secret = identity.secret(_DOMAIN)

    def of(self, digest: str) -> SavedPrefixes | None:
        """Where the engines of a model with that digest keep theirs, and with which key; None if
        they are not to, or cannot be."""
        max_bytes = self._settings.config.engine.saved_prefixes_mb * 1_000_000
        self._clean(max_bytes)
        if not max_bytes:
            return None
        try:
            self._folder.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            log.warning("computed prefixes are not saved: %s", error)
            return None
        key = hashlib.blake2b(digest.encode(), key=self._secret, digest_size=32).digest()
        return SavedPrefixes(str(self._folder), key, max_bytes)

    def _clean(self, max_bytes: int) -> None:
        """Delete what was not used for long, what is more than the budget, and halves."""
        now, taken = time.time(), 0
        for file in sorted(self._files(), key=lambda file: -file[1]):
            path, used, size = file
            taken += size
            longest = _MAX_AGE_SECONDS if path.suffix == ".prefix" else _MAX_WRITE_SECONDS
            if taken > max_bytes or now - used > longest:
                with suppress(OSError):
                    path.unlink()

    def _files(self) -> list[tuple[Path, float, int]]:
        """With the times of their last use, and their sizes."""
        found = []
        with suppress(OSError):
            for path in self._folder.iterdir():
                with suppress(OSError):
                    status = path.stat()
                    found.append((path, status.st_mtime, status.st_size))
        return found
