"""An unfinished copy whose pieces have no known hashes: those that arrived are noted beside it.

The notes, `.partial/DIGEST.pieces`, are records of a piece's number and SHA-256, written after the
piece.  A record counts only if the piece still has that hash, so neither a `kill -9` nor a power
cut between the two writes makes a wrong piece look right.
"""

from __future__ import annotations

import hashlib
import os
import struct
from pathlib import Path

from pinaivu_box.models.partial_file import HASH_BYTES, PartialFile, count

_RECORD = struct.Struct(f"<I{HASH_BYTES}s")


class UnhashedFile(PartialFile):
    """A `PartialFile` that takes any data for a piece, and knows its pieces after a restart."""

    def __init__(self, folder: Path, digest: str, size: int) -> None:
        """`digest` names it.  Raises CopyInProgress, NoRoom, OSError."""
        self._hashes = bytearray(count(size) * HASH_BYTES)
        self._notes = -1
        super().__init__(folder, digest, size, memoryview(self._hashes))
        self._notes_path = self.path.with_name(f"{digest}.pieces")
        self._notes = os.open(self._notes_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self._read_notes()

    def _read_notes(self) -> None:
        records = os.fstat(self._notes).st_size // _RECORD.size
        data = os.pread(self._notes, records * _RECORD.size, 0)
        for number, digest in _RECORD.iter_unpack(data):
            if number < count(self.size):
                self._note(number, digest)
        os.ftruncate(self._notes, len(data))  # without a record that was cut off
        os.lseek(self._notes, 0, os.SEEK_END)

    def _note(self, number: int, digest: bytes) -> None:
        self._hashes[number * HASH_BYTES : (number + 1) * HASH_BYTES] = digest

    def put(self, number: int, data: bytes) -> bool:
        """Keep a piece."""
        digest = hashlib.sha256(data).digest()
        self._note(number, digest)
        kept = super().put(number, data)
        with self._writing:
            if not self._closed:
                os.write(self._notes, _RECORD.pack(number, digest))
        return kept

    def sync(self) -> None:
        super().sync()
        self._notes_path.unlink(missing_ok=True)  # it is whole, and compared with its digest

    def discard(self) -> None:
        super().discard()
        self._notes_path.unlink(missing_ok=True)

    def close(self) -> None:
        super().close()
        with self._writing:
            if self._notes >= 0:
                os.close(self._notes)
                self._notes = -1

    @property
    def hashes(self) -> bytes:
        """Of the pieces that are there; zeros for the others."""
        return bytes(self._hashes)
