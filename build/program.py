"""Makes the executable without its model: the launcher, and the program that it unpacks.

program.py EXECUTABLE LAUNCHER FOLDER

FOLDER is what PyInstaller has made.  The format of the program is described in launcher/main.c.
"""

import shutil
import struct
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from pinaivu_box import appended
from pinaivu_box.engine.payload import zstd

# 48 MB in 6 seconds; level 12 takes 14, and level 19 minutes.  The window is large enough to pack
# what differs between ggml's libraries for different processors.
LEVEL, WINDOW_LOG = 9, 26
LENGTH = struct.Struct("<I")  # of the table
ENTRY = struct.Struct("<cQH")  # of the table: kind, size, the length of the name
BLOCK = 1 << 20


def make(executable: Path, launcher: Path, folder: Path) -> None:
    """Writes to `executable` the launcher with the files below `folder` as its program."""
    shutil.copyfile(launcher, executable)
    executable.chmod(0o755)
    with tempfile.NamedTemporaryFile(dir=executable.parent) as packed:
        pack(folder, Path(packed.name))
        appended.append(executable, appended.PROGRAM, Path(packed.name))


def pack(folder: Path, target: Path) -> None:
    """Writes the program.  The same files give the same bytes."""
    paths = sorted(folder.rglob("*"))
    table = b"".join(entry(path, str(path.relative_to(folder)).encode()) for path in paths)
    with target.open("wb") as out:
        out.write(LENGTH.pack(len(table)) + table)
        with zstd.open(out, "wb", options=compression()) as packed:
            for path in paths:
                if path.is_symlink():
                    packed.write(bytes(path.readlink()))
                elif path.is_file():
                    with path.open("rb") as file:
                        shutil.copyfileobj(file, packed, BLOCK)


def compression() -> dict[int, int]:
    parameters = zstd.CompressionParameter
    return {
        parameters.compression_level: LEVEL,
        parameters.window_log: WINDOW_LOG,
        parameters.enable_long_distance_matching: 1,
        parameters.checksum_flag: 1,
        parameters.nb_workers: 2,
    }


def entry(path: Path, name: bytes) -> bytes:
    if path.is_symlink():
        kind, size = b"l", len(bytes(path.readlink()))
    elif path.is_dir():
        kind, size = b"d", 0
    else:
        kind, size = b"x" if path.name == "pinaivu" else b"f", path.stat().st_size
    return ENTRY.pack(kind, size, len(name)) + name


def files(executable: Path) -> Iterator[tuple[str, bytes]]:
    """The files of an executable's program: name, content."""
    (found,) = [one for one in appended.read(executable) if one.mark == appended.PROGRAM]
    with executable.open("rb") as file:
        file.seek(found.offset)
        (length,) = LENGTH.unpack(file.read(LENGTH.size))
        table, at = file.read(length), 0
        with zstd.open(file) as content:
            while at < length:
                kind, size, name_size = ENTRY.unpack_from(table, at)
                at += ENTRY.size + name_size
                data = content.read(size)
                if kind in b"fx":
                    yield table[at - name_size : at].decode(), data


if __name__ == "__main__":
    make(*map(Path, sys.argv[1:]))
