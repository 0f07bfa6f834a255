"""Documents that commands read: a file, or the standard input."""

from __future__ import annotations

import sys
from pathlib import Path

from pinaivu_box.errors import CliError


def document(name: str) -> bytes | None:
    """Of the file with that name ('-': standard input); None if there is none.  Raises CliError if
    it cannot be read."""
    if name == "-":
        return sys.stdin.buffer.read()
    path = Path(name)
    try:
        return path.read_bytes() if path.is_file() else None
    except OSError as error:
        raise CliError(f"{name[:200]} cannot be read: {error.strerror}.") from error
