"""Makes payloads (see pinaivu_box/engine/payload.py), and puts the executable together.

payloads.py make TARGET NAME FOLDER [COMPANION...]
payloads.py assemble EXECUTABLE MODEL [PAYLOAD...]
"""

import hashlib
import sys
from pathlib import Path

import msgspec

from pinaivu_box import appended
from pinaivu_box.engine.payload import LENGTH, Payload, PayloadFile, Table, zstd

LEVEL = 10  # higher ones take minutes and gain little: GPU code comes compressed


def make(target: Path, name: str, folder: Path, companions: list[Path]) -> None:
    """Writes to `target` a payload with all files below `folder`.  `companions` are payloads that
    it may be used with."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = [
        PayloadFile(str(path.relative_to(folder)), path.stat().st_size, digest(path))
        for path in paths
    ]
    beside = {path.name: Payload(path, 0).digest for path in companions}
    table = msgspec.json.encode(Table(name, files, beside))
    with target.open("wb") as out:
        out.write(LENGTH.pack(len(table)) + table)
        with zstd.open(out, "wb", options=compression()) as packed:
            for path in paths:
                with path.open("rb") as source:
                    while data := source.read(1 << 20):
                        packed.write(data)


def compression() -> dict[int, int]:
    parameters = zstd.CompressionParameter
    return {parameters.compression_level: LEVEL, parameters.nb_workers: 2}


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def assemble(executable: Path, model: Path, payloads: list[Path]) -> None:
    """Appends payloads and the default model to the executable, in place of those it has."""
    (program,) = [one for one in appended.read(executable) if one.mark == appended.PROGRAM]
    with executable.open("r+b") as file:
        file.truncate(program.offset + program.size + appended.FOOTER.size)
    for path in payloads:
        appended.append(executable, appended.PAYLOAD, path)
    appended.append(executable, appended.MODEL, model)


if __name__ == "__main__":
    command, target, *rest = sys.argv[1:]
    if command == "make":
        make(Path(target), rest[0], Path(rest[1]), [Path(path) for path in rest[2:]])
    else:
        assemble(Path(target), Path(rest[0]), [Path(path) for path in rest[1:]])
