"""Prints which glibc an executable needs, and the file in it that asks for it: `2 35 libm.so`.

Run by .venv's Python: baseline.py EXECUTABLE [FOLDER...]; FOLDERs have what payloads hold.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import glibc
import program


def files(executable: Path) -> Iterator[tuple[str, bytes]]:
    """All files of an executable's program, and the executable itself."""
    yield executable.name, executable.read_bytes()
    yield from program.files(executable)


def main(executable: str, *folders: str) -> None:
    needs = [glibc.baseline(files(Path(executable)))]
    needs += [glibc.baseline(glibc.below(Path(folder))) for folder in folders]
    need = max(needs, key=lambda one: one.version)
    print(*need.version, need.file)


if __name__ == "__main__":
    main(*sys.argv[1:])
