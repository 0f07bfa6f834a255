"""Opens model files: regular files only, without ever waiting for one."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO

_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class NotAFile(OSError):
    """It is not a regular file; `strerror` is what it is."""


def why_not(mode: int) -> str | None:
    """What a thing of that mode is if it is no regular file."""
    if stat.S_ISREG(mode):
        return None
    return f"it is {_KINDS.get(stat.S_IFMT(mode), 'no file')}, not a regular file"


def stat_regular(path: Path) -> os.stat_result:
    """The facts of a regular file, or of the one that a link leads to.  Raises OSError."""
    try:
        facts = path.stat()
    except FileNotFoundError:
        if path.is_symlink():
            raise NotAFile(0, "it is a link to a file that does not exist", str(path)) from None
        raise
    if (why := why_not(facts.st_mode)) is not None:
        raise NotAFile(0, why, str(path))
    return facts


def download_mark(path: Path) -> Path:
    """What aria2 keeps beside a file, which has its full size from the start, until it is whole."""
    return path.with_name(f"{path.name}.aria2")


def open_regular(path: Path, buffering: int = -1) -> BinaryIO:
    """The file, opened for reading.  Raises OSError; a FIFO or a device does not hold this up."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        if (why := why_not(os.fstat(handle).st_mode)) is not None:
            raise NotAFile(0, why, str(path))
        return os.fdopen(handle, "rb", buffering)
    except BaseException:
        os.close(handle)
        raise
