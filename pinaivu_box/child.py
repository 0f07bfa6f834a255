"""How this program starts itself as a child, and whether that would be the same version."""

from __future__ import annotations

import sys
from pathlib import Path


def command(name: str) -> list[str]:
    """The arguments that run the hidden command `name` in a child process of the same version."""
    if executable_replaced():  # it would start another version; this one is still unpacked
        return [str(Path(getattr(sys, "_MEIPASS", "")) / "pinaivu"), name]
    if _FROZEN:
        return [sys.executable, name]
    return [sys.executable, "-m", "pinaivu_box", name]


def executable_replaced() -> bool:
    """Whether the executable was replaced since the start: the model and the payloads in it may be
    others."""
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
