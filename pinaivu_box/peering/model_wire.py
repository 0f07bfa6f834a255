"""What two boxes say about model files: the frames of a stream with the purpose `model`.

Who opened it asks, as often as it likes, one thing at a time; then it finishes, and so does the
other.  `Refused` may be the answer to anything; `Working` says that the answer needs a while.

    Find(model, digest)   Have(model, digest, size)
    List(digest)          Hashes, so many that all pieces have one
    Give(digest, number)  Part, so many that the piece is whole
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct, msgpack

from pinaivu_box.peering import wire
from pinaivu_box.text import DIGEST, whole

PURPOSE = "model"
PART_BYTES = 256 * 1024  # of a piece, or of the list of hashes, in a frame
MAX_MODEL_BYTES = 512 * 1024**3
WORKING_SECONDS = 5.0  # between two frames of who answers, at most

Name = Annotated[str, Meta(max_length=128)]
Digest = Annotated[str, Meta(pattern=DIGEST)]
Data = Annotated[bytes, Meta(min_length=1, max_length=PART_BYTES)]


class Find(Struct, frozen=True, tag=True):
    """`digest` is the beginning of one, or empty; with one, the name does not matter."""

    model: Name
    digest: Annotated[str, Meta(pattern=whole("([0-9a-f]{8,64})?"))]


class List(Struct, frozen=True, tag=True):
    digest: Digest


class Give(Struct, frozen=True, tag=True):
    digest: Digest
    number: Annotated[int, Meta(ge=0, le=2**31)]


class Have(Struct, frozen=True, tag=True):
    """`size` in bytes, `digest` the SHA-256 of all of them in hex."""

    model: Name
    digest: Digest
    size: Annotated[int, Meta(ge=1, le=MAX_MODEL_BYTES)]


class Hashes(Struct, frozen=True, tag=True):
    """SHA-256 of pieces of `models.pieces.PIECE_BYTES` each, one after the other."""

    data: Data


class Part(Struct, frozen=True, tag=True):
    data: Data


class Working(Struct, frozen=True, tag=True):
    pass


class Refused(Struct, frozen=True, tag=True):
    """A sentence for the other's operator."""

    message: Annotated[str, Meta(max_length=500)]


Question = Find | List | Give
Answer = Have | Hashes | Part | Working | Refused

_questions: msgpack.Decoder[Question] = msgpack.Decoder(Question)
_answers: msgpack.Decoder[Answer] = msgpack.Decoder(Answer)


def question(frame: bytes) -> Question:
    """Raises ProtocolError."""
    return wire.decode(frame, _questions)


def answer(frame: bytes) -> Answer:
    """Raises ProtocolError."""
    return wire.decode(frame, _answers)
