"""What two boxes say about model files: the frames of a stream with the purpose `model`.

Who opened it asks, as often as it likes, one thing at a time; then it finishes, and so does the
other.  `FileRefused` may be the answer to anything; `Working` says that the answer needs a while.

    Find(model, digest, parts)   Have(model, digest, size, parts)
    List(digest)                 Hashes, so many that all pieces have one
    Give(digest, number)         Part, so many that the piece is whole

A model in several files is found by the digest of the whole; `parts` of the answer are its files,
and each of them is listed and given by its own digest.  A box that can copy such a model says so
in its question (`parts`); older ones do not know of it, and are refused with a sentence.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct, msgpack

from pinaivu_box.models.splits import MAX_PARTS
from pinaivu_box.text import DIGEST, whole
from pinaivu_box.transport import wire

PURPOSE = "model"
PART_BYTES = 256 * 1024  # of a piece, or of the list of hashes, in a frame
MAX_FILE_BYTES = 512 * 1024**3
MAX_MODEL_BYTES = 16 * MAX_FILE_BYTES  # of all its files
WORKING_SECONDS = 5.0  # between two frames of who answers, at most

Name = Annotated[str, Meta(max_length=128)]
Digest = Annotated[str, Meta(pattern=DIGEST)]
Size = Annotated[int, Meta(ge=1, le=MAX_FILE_BYTES)]
Data = Annotated[bytes, Meta(min_length=1, max_length=PART_BYTES)]


class Find(Struct, frozen=True, tag="Find"):
    """`digest` is the beginning of one, or empty; with one, the name does not matter."""

    model: Name
    digest: Annotated[str, Meta(pattern=whole("([0-9a-f]{8,64})?"))]
    parts: bool = False


class List(Struct, frozen=True, tag="List"):
    digest: Digest


class GivePiece(Struct, frozen=True, tag="Give"):
    digest: Digest
    number: Annotated[int, Meta(ge=0, le=2**31)]


class File(Struct, frozen=True):
    """One of a model's; `digest` is the SHA-256 of its `size` bytes in hex."""

    digest: Digest
    size: Size


class ModelAvailable(Struct, frozen=True, tag="Have"):
    """`size` in bytes, `digest` the SHA-256 of all of them in hex; of a model in several files the
    sum, and `models.splits.digest_of_parts`."""

    model: Name
    digest: Digest
    size: Annotated[int, Meta(ge=1, le=MAX_MODEL_BYTES)]
    parts: Annotated[tuple[File, ...], Meta(max_length=MAX_PARTS)] = ()


class Hashes(Struct, frozen=True, tag="Hashes"):
    """SHA-256 of pieces of `models.partial_file.PIECE_BYTES` each, one after the other."""

    data: Data


class PieceData(Struct, frozen=True, tag="Part"):
    data: Data


class Working(Struct, frozen=True, tag="Working"):
    pass


class FileRefused(Struct, frozen=True, tag="Refused"):
    """A sentence for the other's operator."""

    message: Annotated[str, Meta(max_length=500)]


Question = Find | List | GivePiece
Answer = ModelAvailable | Hashes | PieceData | Working | FileRefused

_questions: msgpack.Decoder[Question] = msgpack.Decoder(Question)
_answers: msgpack.Decoder[Answer] = msgpack.Decoder(Answer)


def question(frame: bytes) -> Question:
    """Raises ProtocolError."""
    return wire.decode(frame, _questions)


def answer(frame: bytes) -> Answer:
    """Raises ProtocolError."""
    return wire.decode(frame, _answers)
