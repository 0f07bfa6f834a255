"""Prints which glibc an executable needs, and the file in it that asks for it: `2 35 libm.so`.

Run by .venv's Python: baseline.py EXECUTABLE [FOLDER...]; FOLDERs have what payloads hold.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import glibc
from PyInstaller.archive.readers import CArchiveReader


def files(executable: Path) -> Iterator[tuple[str, bytes]]:
    """All files of an executable, itself included."""
    yield executable.name, executable.read_bytes()
    archive = CArchiveReader(str(executable))
    for name in archive.toc:
        content = archive.extract(name)
        if isinstance(content, bytes):  # others are no files
            yield name, content


def main(executable: str, *folders: str) -> None:
    needs = [glibc.baseline(files(Path(executable)))]
    needs += [glibc.baseline(glibc.below(Path(folder))) for folder in folders]
    need = max(needs, key=lambda one: one.version)
    print(*need.version, need.file)


if __name__ == "__main__":
    main(*sys.argv[1:])
