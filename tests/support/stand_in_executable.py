"""A small executable that is this program in another version: `stand_in` makes it, and it runs this
file, which takes the version, the release key and the executable's own path before the arguments.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pinaivu_box
from pinaivu_box.release import sums


def stand_in(version: str, public_key: Path, more: str = "") -> bytes:
    """A script; `more` are lines of it that come before the program."""
    arguments = f"'{sys.executable}' '{__file__}' {version} '{public_key}'"
    return f'#!/bin/sh\n{more}\nexec {arguments} "$0" "$@"\n'.encode()


def main() -> None:
    version, key, executable, *arguments = sys.argv[1:]
    pinaivu_box.__version__ = version
    sums.PUBLIC_KEY = Path(key)
    sys.frozen = True  # type: ignore[attr-defined]
    sys.executable, sys.argv = executable, [executable, *arguments]
    from pinaivu_box.cli.main import main as program

    program()


if __name__ == "__main__":
    main()
