"""How this program starts a copy of itself, and whether that is still the same version."""

from __future__ import annotations

import sys
from pathlib import Path


def command(name: str) -> list[str]:
    """The arguments that run the hidden command `name` in a child process."""
    if _FROZEN:
        return [sys.executable, name]
    return [sys.executable, "-m", "pinaivu_box", name]


def executable_replaced() -> bool:
    """Whether a child would run another version: the executable was replaced since we started."""
    return _FROZEN and _executable() != _EXECUTABLE


def _executable() -> tuple[int, int] | None:
    """Which file it is that a child would be started from, None if it is gone."""
    try:
        stat = Path(sys.executable).stat()
    except OSError:
        return None
    return (stat.st_dev, stat.st_ino)


_FROZEN = getattr(sys, "frozen", False)
_EXECUTABLE = _executable()  # ours: it keeps its number while we run
