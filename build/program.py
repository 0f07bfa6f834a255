"""Makes the executable without its model: the launcher, and the program that it unpacks.

program.py EXECUTABLE LAUNCHER FOLDER

FOLDER is what PyInstaller has made.  The format of the program is described in launcher/main.c.
"""

import shutil
import struct
import sys
import tempfile
from pathlib import Path

from glibc import baseline, below

from pinaivu_box import appended
from pinaivu_box.engine.payload import zstd

LEVEL = 19  # 12 seconds more than level 10, and 5 MB less
HEADER = struct.Struct("<IHH")  # of the program: the length of its table, the glibc that it needs
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
        out.write(HEADER.pack(len(table), *baseline(below(folder)).version) + table)
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


if __name__ == "__main__":
    make(*map(Path, sys.argv[1:]))
