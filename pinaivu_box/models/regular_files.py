"""Opens model files: regular files only, without ever waiting for one."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

_READ_BYTES = 1 << 20
_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class NotAFile(OSError):
    """It is not a regular file; `strerror` is what it is."""


def _check_mode(mode: int, path: Path) -> None:
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "no file")
        raise NotAFile(0, f"it is {kind}, not a regular file", str(path))


def stat_regular(path: Path) -> os.stat_result:
    """The facts of a regular file, or of the one that a link leads to.  Raises OSError."""
    try:
        facts = path.stat()
    except FileNotFoundError:
        if path.is_symlink():
            raise NotAFile(0, "it is a link to a file that does not exist", str(path)) from None
        raise
    _check_mode(facts.st_mode, path)
    return facts


def expanded(path: str | Path) -> Path:
    """With the home directory in place of `~`, if there is such a user."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def download_mark(path: Path) -> Path:
    """What aria2 keeps beside a file, which has its full size from the start, until it is whole."""
    return path.with_name(f"{path.name}.aria2")


def open_regular(path: Path, buffering: int = -1) -> BinaryIO:
    """The file, opened for reading.  Raises OSError; a FIFO or a device does not hold this up."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        _check_mode(os.fstat(handle).st_mode, path)
        return os.fdopen(handle, "rb", buffering)
    except BaseException:
        os.close(handle)
        raise


def sha256(path: Path, stopped: Callable[[], bool] = lambda: False) -> str:
    """SHA-256 of a whole file in hex.  Raises OSError, also if it is `stopped`."""
    digest = hashlib.sha256()
    with open_regular(path, buffering=0) as file:
        while data := file.read(_READ_BYTES):
            if stopped():
                raise InterruptedError(0, "its digest is no longer needed", str(path))
            digest.update(data)
    return digest.hexdigest()
