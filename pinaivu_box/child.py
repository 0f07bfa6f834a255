"""How this program starts itself as a child, and whether that would be the same version."""

from __future__ import annotations

import sys
from pathlib import Path


def command(name: str) -> list[str]:
    """The arguments that run the hidden command `name` in a child process."""
    if _FROZEN:
        return [sys.executable, name]
    return [sys.executable, "-m", "pinaivu_box", name]


def executable_replaced() -> bool:
    """Whether the executable was replaced since the start, so that a child is another version."""
    return _FROZEN and _executable() != _EXECUTABLE


def _executable() -> tuple[int, int] | None:
    """The device and inode of the file that a child is started from, None if there is none."""
    try:
        stat = Path(sys.executable).stat()
    except OSError:
        return None
    return (stat.st_dev, stat.st_ino)


_FROZEN = getattr(sys, "frozen", False)
_EXECUTABLE = _executable()  # of this process; the inode does not change while it runs
