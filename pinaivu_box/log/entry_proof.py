"""That an entry is in a log, as one text (C2SP tlog-proof): its index, the hashes of an inclusion
proof, and a checkpoint with its signatures.  Verified offline from the entry and this alone."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence

from msgspec import Struct

from pinaivu_box.log import checkpoint, merkle, note
from pinaivu_box.log.checkpoint import Checkpoint
from pinaivu_box.log.merkle import HASH_BYTES, MAX_PROOF_HASHES
from pinaivu_box.log.note import Note, NoteError
from pinaivu_box.text import END

_HEADER = "c2sp.org/tlog-proof@v1"
_INDEX = re.compile("index (0|[1-9][0-9]{0,15})" + END)


class EntryProof(Struct, frozen=True):
    index: int
    hashes: tuple[bytes, ...]
    note: Note  # a checkpoint

    def __str__(self) -> str:
        return f"{_HEADER}\nindex {self.index}\n{hash_lines(self.hashes)}\n{self.note}"

    @property
    def in_receipts(self) -> str:
        """As text with the cosignatures of boxes alone: a verifier of receipts knows no other
        keys, and refuses what it cannot verify."""
        return str(EntryProof(self.index, self.hashes, checkpoint.of_boxes(self.note)))

    def includes(self, entry: bytes, signed: Checkpoint) -> bool:
        """Whether it shows that the log of that checkpoint has the entry at its index."""
        leaf = merkle.leaf_hash(entry)
        return merkle.includes(signed.root, signed.size, self.index, leaf, self.hashes)


def entry_of(signed_receipt: bytes) -> bytes:
    """The entry of a receipt in its coordinator's log: the SHA-256 of the bytes that were signed,
    so that a published log tells nothing of it."""
    return hashlib.sha256(signed_receipt).digest()


def read(text: str) -> EntryProof:
    """Unverified.  Raises NoteError."""
    head, separator, signed = text.partition("\n\n")
    header, *lines = head.split("\n")
    if header != _HEADER or not separator or not lines:
        raise NoteError("it is not a proof in the form of C2SP tlog-proof")
    if not (index := _INDEX.match(lines[0])):
        raise NoteError("its index is not a number")
    signed_note = note.read(signed)
    checkpoint.read(signed_note)
    return EntryProof(int(index[1]), read_hashes(lines[1:]), signed_note)


def hash_lines(hashes: Sequence[bytes]) -> str:
    return "".join(f"{note.encode(each)}\n" for each in hashes)


def read_hashes(lines: Sequence[str]) -> tuple[bytes, ...]:
    """Raises NoteError."""
    hashes = tuple(map(note.decode, lines))
    if len(hashes) > MAX_PROOF_HASHES or any(len(each) != HASH_BYTES for each in hashes):
        raise NoteError(f"a proof has at most {MAX_PROOF_HASHES} hashes of {HASH_BYTES} bytes")
    return hashes
