"""What a witness decides about a checkpoint that it is given (C2SP tlog-witness, add-checkpoint).

Pure: whoever calls it has read the last checkpoint that was cosigned, and keeps the new one before
the cosignature leaves the box, so that nothing comes between.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from nacl.exceptions import BadSignatureError
from nacl.signing import VerifyKey

from pinaivu_box.log import entry_proof, note
from pinaivu_box.log.merkle import EMPTY_ROOT, HASH_BYTES, MAX_PROOF_HASHES, MAX_SIZE, is_consistent
from pinaivu_box.log.note import ED25519, MAX_NOTE_BYTES, Note, NoteError, NoteKey, NoteSignature
from pinaivu_box.text import number

MAX_BODY_BYTES = MAX_NOTE_BYTES + 64 * (MAX_PROOF_HASHES + 1)
SIZE_TYPE = "text/x.tlog.size"  # of the answer 409
_SIZE = re.compile("0|[1-9][0-9]{0,15}")
_MAX_ORIGIN_CHARACTERS = 300


class TreeHead(NamedTuple):
    """The first three lines of a checkpoint of any log."""

    origin: str
    size: int
    root: bytes


class Submission(NamedTuple):
    """`old` is the size from which `proof` leads to the checkpoint, as its sender believes the last
    one that was cosigned."""

    old: int
    proof: tuple[bytes, ...]
    note: Note

    @property
    def text(self) -> str:
        return f"old {self.old}\n{entry_proof.hash_lines(self.proof)}\n{self.note}"


class Rejected(Exception):
    """`status` as tlog-witness has it; `size` is that of the last checkpoint with 409, and `why` a
    sentence."""

    def __init__(self, status: int, why: str, size: int = 0) -> None:
        super().__init__(why)
        self.status, self.why, self.size = status, why, size


def read_submission(text: str) -> Submission:
    """Raises Rejected (400)."""
    head, separator, signed = text.partition("\n\n")
    first, *lines = head.split("\n")
    size = _size(first.removeprefix("old ")) if first.startswith("old ") else None
    if size is None or not separator:
        raise _malformed("It does not begin with a line 'old' and a size")
    try:
        return Submission(size, entry_proof.read_hashes(lines), note.read(signed))
    except NoteError as error:
        raise _malformed(f"It cannot be read: {error}") from None


def head_of(signed: Note) -> TreeHead:
    """What the checkpoint says, unverified; lines after the first three are the log's own.  Raises
    Rejected (400)."""
    lines = signed.text.split("\n")
    if len(lines) < 4 or not all(lines[:-1]):
        raise _malformed("Its checkpoint does not have three lines: origin, size and root")
    size = _size(lines[1])
    if size is None or size > MAX_SIZE or len(lines[0]) > _MAX_ORIGIN_CHARACTERS:
        raise _malformed("Its checkpoint has no size, or too large a one, or a long origin")
    try:
        root = note.decode(lines[2])
    except NoteError as error:
        raise _malformed(f"Its checkpoint's root cannot be read: {error}") from None
    if len(root) != HASH_BYTES:
        raise _malformed(f"Its checkpoint's root does not have {HASH_BYTES} bytes")
    return TreeHead(lines[0], size, root)


def own_signature(signed: Note, key: NoteKey) -> NoteSignature:
    """The log's own signature, which holds; others do not count.  Raises Rejected (403)."""
    for each in signed.signatures:
        if each.is_by(key):
            if key.type == ED25519 and _verifies(key, signed.text, each.signature):
                return each
            raise Rejected(403, "The log's signature is wrong.")
    raise Rejected(403, "The log has not signed the checkpoint.")


def judge(submission: Submission, head: TreeHead, last: TreeHead | None) -> None:
    """Whether to cosign a checkpoint that its log has signed, where `last` is the last one that was
    cosigned.  Raises Rejected (400, 409, 422)."""
    old, proof, _ = submission
    if old > head.size:
        raise Rejected(400, "The old size is larger than that of the checkpoint.")
    last_size = last.size if last else 0
    if old != last_size:
        why = f"The last checkpoint that was cosigned has size {last_size}."
        raise Rejected(409, why, last_size)
    last_root = last.root if last else EMPTY_ROOT
    if head.size == 0 and head.root != EMPTY_ROOT:
        raise Rejected(422, "A tree without entries has the hash of nothing as its root.")
    if not is_consistent(old, last_root, head.size, head.root, proof):
        why = f"The proof does not lead from the {old} entries that were cosigned to these."
        raise Rejected(422, why)


def _size(text: str) -> int | None:
    return number(text) if _SIZE.fullmatch(text) else None


def _malformed(why: str) -> Rejected:
    return Rejected(400, f"{why}.")


def _verifies(key: NoteKey, text: str, signature: bytes) -> bool:
    try:
        VerifyKey(key.public).verify(text.encode(), signature)
    except (BadSignatureError, ValueError):
        return False
    return True
