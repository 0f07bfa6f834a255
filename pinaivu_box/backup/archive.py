"""The archive inside a backup: written and read as a stream; its layout is in the package."""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Callable
from io import BufferedReader, BytesIO
from typing import Annotated, BinaryIO

import msgspec
from msgspec import Meta, Struct

from pinaivu_box.backup.sealed import BadBackup, Sealer, Unsealer
from pinaivu_box.models import aliases, overrides

FORMAT = 1
IDENTITY, CONFIG, DATABASE = "identity.key", "config.toml", "pinaivu.db"
# What a home may have, in this order, and what it must have.
NAMES = (IDENTITY, CONFIG, aliases.FILE_NAME, overrides.FILE_NAME, DATABASE)
_REQUIRED = {IDENTITY, DATABASE}
_MANIFEST, _DIGEST = "manifest.json", "manifest.sha256"
_BLOCK = 512
_PIECE = 1 << 20
_MAX_MANIFEST_BYTES = 65536
_END = bytes(2 * _BLOCK)

OpenFile = BufferedReader | BytesIO
Source = BinaryIO | Unsealer


class ArchivePart(Struct, frozen=True):
    """A file of the home: its size in bytes and its SHA-256 in hex."""

    name: str
    size: Annotated[int, Meta(ge=0)]
    sha256: str


class Manifest(Struct, frozen=True):
    """`version` is the program's, `schema` the database's; `created` is RFC 3339."""

    version: str
    schema: int
    node_id: str
    created: str
    parts: list[ArchivePart]
    format: int = FORMAT


def part_of(name: str, file: OpenFile) -> ArchivePart:
    """The entry of an open file, whose position is then at the beginning."""
    digest = hashlib.file_digest(file, "sha256").hexdigest()
    size = file.seek(0, 2)
    file.seek(0)
    return ArchivePart(name, size, digest)


def write(sink: BinaryIO | Sealer, manifest: Manifest, files: dict[str, OpenFile]) -> None:
    """Write the archive; `files` are the open files of its parts."""
    text = msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n"
    for name, content in ((_MANIFEST, text), (_DIGEST, _digest_line(text))):
        sink.write(_header(name, len(content)) + content + _padding(len(content)))
    for part in manifest.parts:
        sink.write(_header(part.name, part.size))
        while piece := files[part.name].read(_PIECE):
            sink.write(piece)
        sink.write(_padding(part.size))
    sink.write(_END)


def read_manifest(source: Source) -> Manifest:
    """Read the beginning of an archive.  Raises BadBackup, OSError."""
    block = source.read(_BLOCK)
    try:
        size = tarfile.TarInfo.frombuf(block, "utf-8", "strict").size
    except (tarfile.HeaderError, ValueError):
        raise BadBackup("it was not created by 'pinaivu backup'") from None
    if not 0 < size <= _MAX_MANIFEST_BYTES or block != _header(_MANIFEST, size):
        raise BadBackup("it was not created by 'pinaivu backup'")
    text = _exactly(source, size)
    _expect(source, _padding(size))
    line = _digest_line(text)
    _expect(source, _header(_DIGEST, len(line)) + line + _padding(len(line)))
    try:
        manifest = msgspec.json.decode(text, type=Manifest)
    except ValueError as error:
        raise BadBackup(f"its manifest cannot be read ({error})") from error
    if manifest.format > FORMAT:
        raise BadBackup("it was created by a newer Pinaivu Box: update the program")
    names = [part.name for part in manifest.parts]
    if names != [name for name in NAMES if name in names] or not _REQUIRED.issubset(names):
        raise BadBackup(f"it contains {', '.join(names) or 'nothing'}, which is not a home")
    return manifest


def read_parts(source: Source, manifest: Manifest, open_part: Callable[[str], BinaryIO]) -> None:
    """Check what follows the manifest, and write each part to the file that `open_part` opens.

    Raises BadBackup, OSError.
    """
    for part in manifest.parts:
        _expect(source, _header(part.name, part.size))
        digest = hashlib.sha256()
        with open_part(part.name) as out:
            left = part.size
            while left:
                piece = _exactly(source, min(left, _PIECE))
                digest.update(piece)
                out.write(piece)
                left -= len(piece)
        if digest.hexdigest() != part.sha256:
            raise BadBackup(f"its {part.name} is damaged: its SHA-256 differs from the manifest")
        _expect(source, _padding(part.size))
    _expect(source, _END)
    if source.read(1):
        raise BadBackup("there is data after its end")


def _header(name: str, size: int) -> bytes:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = size, 0o600
    return entry.tobuf(tarfile.GNU_FORMAT)


def _padding(size: int) -> bytes:
    return bytes(-size % _BLOCK)


def _digest_line(text: bytes) -> bytes:
    return f"{hashlib.sha256(text).hexdigest()}  {_MANIFEST}\n".encode()


def _exactly(source: Source, size: int) -> bytes:
    data = source.read(size)
    if len(data) < size:
        raise BadBackup("it is truncated")
    return data


def _expect(source: Source, expected: bytes) -> None:
    if _exactly(source, len(expected)) != expected:
        raise BadBackup("it is damaged between its parts")
