"""The frames about model files, on a stream with the purpose `model`.

Who opened it asks any number of questions, one at a time; then it finishes, and so does the other.
`FileRefused` may be the answer to any question; `Working` comes while an answer takes time.

    Find(model, digest, parts)   ModelAvailable(model, digest, size, parts)
    List(digest)                 Hashes, until each piece has one
    GivePiece(digest, number)    PieceData, until the piece is complete

A model in several files is found by the digest of the whole; `parts` of the answer are its files,
and each of them is listed and sent by its own digest, as is a projector.  A box that can copy such
a model says so in its question (`parts`); older ones cannot, and are refused with a sentence.  The
digest does not cover the projector: which one goes with a model is what most of its owners say.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import UNSET, Meta, Struct, UnsetType, msgpack

from pinaivu_box.models.splits import MAX_PARTS
from pinaivu_box.text import DIGEST, whole

PURPOSE = "model"
MAX_DATA_BYTES = 256 * 1024  # of a piece, or of the list of hashes, in a frame
MAX_FILE_BYTES = 512 * 1024**3
MAX_MODEL_BYTES = 16 * MAX_FILE_BYTES  # of all its files
WORKING_SECONDS = 5.0  # between two frames of an answer, at most

Name = Annotated[str, Meta(max_length=128)]
Digest = Annotated[str, Meta(pattern=DIGEST)]
Size = Annotated[int, Meta(ge=1, le=MAX_FILE_BYTES)]
Data = Annotated[bytes, Meta(min_length=1, max_length=MAX_DATA_BYTES)]


class Find(Struct, frozen=True, tag="Find"):
    """Asks for a model by the beginning of its `digest`, or, if that is empty, by its name."""

    model: Name
    digest: Annotated[str, Meta(pattern=whole("([0-9a-f]{8,64})?"))]
    parts: bool = False


class List(Struct, frozen=True, tag="List"):
    """Asks for the hashes of a file's pieces."""

    digest: Digest


class GivePiece(Struct, frozen=True, tag="Give"):
    """Asks for a piece of a file."""

    digest: Digest
    number: Annotated[int, Meta(ge=0, le=2**31)]


class File(Struct, frozen=True):
    """One of a model's files; `digest` is the SHA-256 of its `size` bytes in hex."""

    digest: Digest
    size: Size


class ModelAvailable(Struct, frozen=True, tag="Have"):
    """`size` in bytes, `digest` the SHA-256 of all of them in hex; of a model in several files the
    sum, and `models.splits.digest_of_parts`.  `projector` is the file with which it sees images."""

    model: Name
    digest: Digest
    size: Annotated[int, Meta(ge=1, le=MAX_MODEL_BYTES)]
    parts: Annotated[tuple[File, ...], Meta(max_length=MAX_PARTS)] = ()
    projector: File | UnsetType = UNSET

    @property
    def files(self) -> tuple[File, ...]:
        """All files of the model."""
        return self.parts or (File(self.digest, self.size),)


class Hashes(Struct, frozen=True, tag="Hashes"):
    """SHA-256 of pieces of `models.partial_file.PIECE_BYTES` each, one after the other."""

    data: Data


class PieceData(Struct, frozen=True, tag="Part"):
    """The next bytes of a piece."""

    data: Data


class Working(Struct, frozen=True, tag="Working"):
    """The answer takes time."""


class FileRefused(Struct, frozen=True, tag="Refused"):
    """A sentence for the operator of who has asked."""

    message: Annotated[str, Meta(max_length=500)]


Question = Find | List | GivePiece
Answer = ModelAvailable | Hashes | PieceData | Working | FileRefused

questions: msgpack.Decoder[Question] = msgpack.Decoder(Question)
answers: msgpack.Decoder[Answer] = msgpack.Decoder(Answer)
