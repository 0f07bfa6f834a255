"""Evidence that a box has signed two histories of one log, which anybody can verify offline.

It is two checkpoints with the log's signature.  Of one size, they have different roots.  Of two
sizes, there are hashes too: a consistency proof of the larger tree that leads to another root at
the smaller size than the log has signed there (`merkle.other_beginning`).  Nobody but the holder of
the key can make such a pair.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Annotated, Literal, NamedTuple

import msgspec
from msgspec import Meta, Struct

from pinaivu_box.log import checkpoint, merkle, note
from pinaivu_box.log.checkpoint import Checkpoint
from pinaivu_box.log.merkle import HASH_BYTES, MAX_PROOF_HASHES
from pinaivu_box.log.note import MAX_NOTE_BYTES, Note, NoteError

MAX_EVIDENCE_BYTES = 2 * MAX_NOTE_BYTES + 8192


class Fork(Struct, frozen=True, forbid_unknown_fields=True):
    """`checkpoints` are notes, that of the smaller size first; `proof` are hashes in Base64, none
    if both have one size."""

    checkpoints: tuple[str, str]
    proof: Annotated[tuple[str, ...], Meta(max_length=MAX_PROOF_HASHES + 1)] = ()
    v: Literal[1] = 1
    kind: Literal["fork"] = "fork"

    @property
    def document(self) -> bytes:
        """As it is stored, passed on and printed."""
        return msgspec.json.format(msgspec.json.encode(self), indent=2) + b"\n"


class EvidenceCheck(NamedTuple):
    """A check of evidence: whether it holds, and in a sentence what that means."""

    name: str
    ok: bool
    meaning: str


def fork(first: Note, second: Note, proof: Sequence[bytes] = ()) -> Fork | None:
    """The evidence that these two are, or None if they show no fork.  Signatures count that are the
    log's own; the others are left out.  Raises NoteError if one is not a checkpoint."""
    one, other = (checkpoint.without_cosignatures(each) for each in (first, second))
    if checkpoint.read(one).size > checkpoint.read(other).size:
        one, other = other, one
    found = Fork((str(one), str(other)), tuple(map(note.encode, proof)))
    return found if all(step.ok for step in verify(found.document)) else None


def normalised(document: bytes) -> bytes:
    """Evidence that holds, without all that it does not need: signatures of others, which nobody
    has verified, and another way to write the JSON.  Raises NoteError if it does not hold."""
    read(document)
    found = _decode(document)
    first, second = map(note.read, found.checkpoints)
    needed = fork(first, second, tuple(map(note.decode, found.proof)))
    if needed is None:
        raise NoteError("it shows no fork")
    return needed.document


def id_of(document: bytes) -> str:
    """By the origin and the sizes of what it shows, so that one fork is known once.  The document
    has been verified."""
    first, second = (checkpoint.read(note.read(text)) for text in _decode(document).checkpoints)
    return hashlib.sha256(f"{first.text}\n{second.text}".encode()).hexdigest()[:32]


def read(document: bytes) -> tuple[Checkpoint, Checkpoint]:
    """The two checkpoints of evidence that holds.  Raises NoteError if it does not."""
    for step in verify(document):
        if not step.ok:
            raise NoteError(f"{step.name}: {step.meaning}")
    first, second = (checkpoint.read(note.read(text)) for text in _decode(document).checkpoints)
    return first, second


def verify(document: bytes) -> list[EvidenceCheck]:
    """All checks in order, up to the first that fails."""
    try:
        found = _decode(document)
        notes = [note.read(text) for text in found.checkpoints]
        first, second = map(checkpoint.read, notes)
        proof = tuple(map(note.decode, found.proof))
        if any(len(each) != HASH_BYTES for each in proof):
            raise NoteError(f"its hashes do not have {HASH_BYTES} bytes each")
        if first.origin != second.origin or first.size > second.size:
            raise NoteError("its checkpoints are not of one log, the smaller first")
    except NoteError as error:
        return [EvidenceCheck("form", False, f"This is no evidence: {error}.")]
    steps = [EvidenceCheck("form", True, f"Two checkpoints of {first.origin}.")]
    for number, (signed, seen) in enumerate(zip(notes, (first, second), strict=True), start=1):
        if not checkpoint.is_signed(signed, seen):
            meaning = f"{first.node_id} has not signed checkpoint {number}."
            return [*steps, EvidenceCheck(f"signature {number}", False, meaning)]
        meaning = f"{first.node_id} has signed that its first {seen.size} entries have this root."
        steps.append(EvidenceCheck(f"signature {number}", True, meaning))
    return [*steps, _disagreement(first, second, proof)]


def _disagreement(first: Checkpoint, second: Checkpoint, proof: Sequence[bytes]) -> EvidenceCheck:
    name, fork = "fork", "No tree has both: the box has signed two histories of one log."
    if first.size == second.size:
        if proof or first.root == second.root:
            return EvidenceCheck(name, False, "Both checkpoints say the same.")
        return EvidenceCheck(
            name, True, f"Both are of {first.size} entries, with different roots.  {fork}"
        )
    if merkle.other_beginning(first.size, first.root, second.size, second.root, proof):
        meaning = (
            f"The hashes lead to the second root, and to another one than the first at "
            f"{first.size} entries.  {fork}"
        )
        return EvidenceCheck(name, True, meaning)
    return EvidenceCheck(name, False, "The hashes do not show that the two checkpoints disagree.")


def _decode(document: bytes) -> Fork:
    """Raises NoteError."""
    if len(document) > MAX_EVIDENCE_BYTES:
        raise NoteError(f"it is longer than {MAX_EVIDENCE_BYTES} bytes")
    try:
        return msgspec.json.decode(document, type=Fork)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise NoteError(f"it is not the JSON of a fork ({error})") from None
