"""Small JSON files in the home that hold what operators set of models while the box ran."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from pinaivu_box.errors import CliError

T = TypeVar("T")

_MAX_BYTES = 1024 * 1024


def read(path: Path, kind: type[T], default: T) -> T:
    """What the file holds, `default` if there is none.  Raises CliError."""
    try:
        if not path.exists():
            return default
        if path.stat().st_size > _MAX_BYTES:
            raise ValueError("it is too long")
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (OSError, ValueError, RecursionError) as error:
        raise unreadable(path, error) from error


def unreadable(path: Path, error: Exception) -> CliError:
    """The error for a file that cannot be used."""
    reason = getattr(error, "strerror", None) or error
    return CliError(f"{path} cannot be read ({reason}): delete it, or correct it.")


def write(path: Path, value: Any) -> None:
    """Replace the file as a whole; it is on disk then.  Raises OSError."""
    temporary = path.with_name(f".{path.name}.new")
    with temporary.open("wb") as file:
        file.write(msgspec.json.format(msgspec.json.encode(value, order="sorted"), indent=2))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
