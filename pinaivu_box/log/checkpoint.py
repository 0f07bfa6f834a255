"""Checkpoints of logs (C2SP tlog-checkpoint) and cosignatures of witnesses (tlog-cosignature v1).

A log's origin is `pinaivu/log/`, the id of the box and the log's epoch, the Unix time in ms at
which it began: a box that has lost its log begins another, and never signs two histories of one.
The origin begins what the box signs as a checkpoint, so it is the domain of that signature.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from nacl.exceptions import BadSignatureError
from nacl.signing import VerifyKey

from pinaivu_box.identity import NODE_PREFIX, Identity
from pinaivu_box.log.merkle import EMPTY_ROOT, HASH_BYTES, MAX_SIZE
from pinaivu_box.log.note import (
    COSIGNATURE,
    Note,
    NoteError,
    NoteKey,
    NoteSignature,
    decode,
    encode,
)
from pinaivu_box.text import END, number

_ORIGIN = re.compile(r"pinaivu/log/(node_[0-9a-f]{64})/(0|[1-9][0-9]{0,15})" + END)
_WITNESS = re.compile("pinaivu/witness/(node_[0-9a-f]{64})" + END)
_NUMBER = re.compile("(?:0|[1-9][0-9]{0,15})" + END)
_TIME_BYTES = 8
_SIGNATURE_BYTES = 64
_LATEST = 253402300799  # the last second that RFC 3339 can say, as a Unix time


class Checkpoint(NamedTuple):
    """What a log signs: that its first `size` entries have this root (32 bytes)."""

    origin: str
    size: int
    root: bytes

    @property
    def text(self) -> str:
        return f"{self.origin}\n{self.size}\n{encode(self.root)}\n"

    @property
    def node_id(self) -> str:
        """The box whose log it is."""
        return node_of(self.origin)


class Cosignature(NamedTuple):
    """That a witness saw the checkpoint at that time (Unix, in s), consistent with all before."""

    node_id: str
    time: int


def origin(node_id: str, epoch: int) -> str:
    return f"pinaivu/log/{node_id}/{epoch}"


def node_of(log_origin: str) -> str:
    """The id of the box that an origin names.  Raises NoteError."""
    if not (match := _ORIGIN.match(log_origin)):
        raise NoteError("its origin is not that of a box's log")
    return match[1]


def epoch_of(log_origin: str) -> int:
    """Unix milliseconds.  Raises NoteError."""
    if not (match := _ORIGIN.match(log_origin)):
        raise NoteError("its origin is not that of a box's log")
    return int(match[2])


def log_key(log_origin: str) -> NoteKey:
    """The key that signs checkpoints of that origin.  Raises NoteError."""
    return NoteKey(log_origin, _public(node_of(log_origin)))


def witness_key(node_id: str) -> NoteKey:
    return NoteKey(f"pinaivu/witness/{node_id}", _public(node_id), COSIGNATURE)


def read(note: Note) -> Checkpoint:
    """What the note says, unverified.  Raises NoteError for anything but a checkpoint of a box's
    log without extension lines."""
    lines = note.text.split("\n")
    if len(lines) != 4 or lines[3]:
        raise NoteError("a checkpoint has three lines: origin, size and root")
    node_of(lines[0])
    size = number(lines[1]) if _NUMBER.match(lines[1]) else None
    if size is None or size > MAX_SIZE:
        raise NoteError("its size is not a number")
    root = decode(lines[2])
    if len(root) != HASH_BYTES or (size == 0 and root != EMPTY_ROOT):
        raise NoteError("its root is not that of a tree of this size")
    return Checkpoint(lines[0], size, root)


def sign(identity: Identity, checkpoint: Checkpoint) -> Note:
    """Raises NoteError if it is another box's."""
    key = log_key(checkpoint.origin)
    if checkpoint.node_id != identity.node_id:
        raise NoteError("its origin names another box")
    signature = identity.signing_key.sign(checkpoint.text.encode()).signature
    return Note(checkpoint.text, (NoteSignature(key.name, key.id, signature),))


def is_signed(note: Note, checkpoint: Checkpoint) -> bool:
    """Whether the box has signed it whose log it is about."""
    key = log_key(checkpoint.origin)
    signatures = [each.signature for each in note.signatures if each.is_by(key)]
    return bool(signatures) and _verifies(key, note.text, signatures[0])


def without_cosignatures(signed: Note) -> Note:
    """With the log's own signature only.  Raises NoteError if it is no checkpoint."""
    key = log_key(read(signed).origin)
    return Note(signed.text, tuple(each for each in signed.signatures if each.is_by(key)))


def cosign(identity: Identity, text: str, time: int) -> NoteSignature:
    """A witness's signature over the text of a checkpoint, which it has found consistent with all
    that it saw before; `time` is a Unix time in s."""
    key = witness_key(identity.node_id)
    signature = identity.signing_key.sign(_cosigned(text, time)).signature
    return NoteSignature(key.name, key.id, time.to_bytes(_TIME_BYTES, "big") + signature)


def cosignature(note: Note, node_id: str) -> Cosignature | None:
    """That of a witness, if the note has one and it is right.  Raises NoteError if it is wrong."""
    key = witness_key(node_id)
    found = [each for each in note.signatures if each.is_by(key)]
    return read_cosignature(note.text, found[0], node_id) if found else None


def read_cosignature(text: str, claimed: NoteSignature, node_id: str) -> Cosignature:
    """That of the witness `node_id` (`witness_of`) over the text of a checkpoint.  Raises NoteError
    if it is wrong."""
    time = _time_of(text, claimed, witness_key(node_id))
    if time is None:
        raise NoteError(f"the cosignature of {node_id} is not its own")
    return Cosignature(node_id, time)


def cosignature_by(note: Note, key: NoteKey) -> NoteSignature | None:
    """The cosignature by a key that is no box's, if the note has one and it is right."""
    found = next((each for each in note.signatures if each.is_by(key)), None)
    # A time of 0 is none (C2SP tlog-witness).
    return found if found is not None and _time_of(note.text, found, key) else None


def _time_of(text: str, claimed: NoteSignature, key: NoteKey) -> int | None:
    """When the checkpoint was cosigned; None if the cosignature is not right."""
    time_bytes, signature = claimed.signature[:_TIME_BYTES], claimed.signature[_TIME_BYTES:]
    time = int.from_bytes(time_bytes, "big")
    right = len(signature) == _SIGNATURE_BYTES and time <= _LATEST
    return time if right and _verifies(key, _cosigned(text, time), signature) else None


def of_boxes(signed: Note) -> Note:
    """With the signature of the log and the cosignatures of boxes, and without those whose keys
    nobody knows from their names.  Raises NoteError if it is no checkpoint."""
    key = log_key(read(signed).origin)
    known = [each for each in signed.signatures if each.is_by(key) or witness_of(each)]
    return Note(signed.text, tuple(known))


def witness_of(claimed: NoteSignature) -> str | None:
    """The id of the box whose cosignature it says it is, unverified; None if it does not."""
    if not (match := _WITNESS.match(claimed.name)):
        return None
    return match[1] if claimed.is_by(witness_key(match[1])) else None


def witnesses_named(note: Note) -> list[str]:
    """The ids of boxes whose cosignatures the note claims to have, unverified."""
    return [node_id for each in note.signatures if (node_id := witness_of(each)) is not None]


def _cosigned(text: str, time: int) -> bytes:
    return f"cosignature/v1\ntime {time}\n{text}".encode()


def _public(node_id: str) -> bytes:
    return bytes.fromhex(node_id.removeprefix(NODE_PREFIX))


def _verifies(key: NoteKey, message: str | bytes, signature: bytes) -> bool:
    data = message.encode() if isinstance(message, str) else message
    try:
        VerifyKey(key.public).verify(data, signature)
    except (BadSignatureError, ValueError):
        return False
    return True
