"""The interface to what computes, a runner, and what passes through it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from pinaivu_box.engine.messages import DeviceMemory, SamplingDefaults
from pinaivu_box.engine.vocabulary import Vocabulary

Int32 = npt.NDArray[np.int32]
Float32 = npt.NDArray[np.float32]
TEXT_BATCH = 256  # max tokens of texts that are embedded at a time


class NoSlot(Exception):
    """The KV cache has no room for this batch (`llama_decode` returned 1); nothing changed."""


class TooManyTokens(Exception):
    """A text has more tokens than the caller allows: `count`, or, unless `exact`, at least that."""

    def __init__(self, count: int, *, exact: bool = True) -> None:
        super().__init__(f"{count} tokens" if exact else f"at least {count} tokens")
        self.count = count
        self.exact = exact


@dataclass(frozen=True)
class ModelFacts:
    """What the scheduler and the prompt need to know of a loaded model.

    `context` is the max tokens of one sequence, `kv_tokens` the cells of the whole cache,
    `sequence_ids` how many ids it knows.  Without `sharing` (recurrent models) cells can neither be
    copied nor cut.  With `streams` (see `llama_runner`) a batch is best in order of sequence ids.
    `controls` are the texts of control tokens, which only a template or a raw prompt can write.
    `memory` is what was taken on each device.  With an `exactness` each token of a sequence gives
    the same bits whatever else is computed; the text says on which engines they are the same.
    `cpu_variant` is that of ggml's library for the CPU.
    """

    build: str
    device: str
    context: int
    kv_tokens: int
    max_sequences: int
    n_vocab: int
    n_embd: int
    chat_template: str | None
    bos: str
    eos: str
    end_tokens: frozenset[int]
    infill: tuple[int, int, int] | None = None  # tokens before prefix, before suffix, before middle
    sequence_ids: int = 0  # 0: as many as max_sequences
    sharing: bool = True
    streams: bool = False
    controls: tuple[str, ...] = ()
    defaults: SamplingDefaults = field(default_factory=SamplingDefaults)
    cells: str = ""  # what the contents of cells depend on beside model, build and type
    memory: tuple[DeviceMemory, ...] = ()
    exactness: str = ""
    cpu_variant: str = ""


@dataclass(frozen=True)
class Batch:
    """One step's input: parallel arrays of n tokens.

    `outputs` is 1 where the logits of that position are wanted; sequence ids are below
    `ModelFacts.sequence_ids`.
    """

    tokens: Int32
    positions: Int32
    sequence_ids: Int32
    outputs: npt.NDArray[np.int8]

    @classmethod
    def of(
        cls,
        tokens: Sequence[int],
        positions: Sequence[int],
        sequence_ids: Sequence[int],
        outputs: Sequence[int],
    ) -> Batch:
        return cls(
            np.array(tokens, np.int32),
            np.array(positions, np.int32),
            np.array(sequence_ids, np.int32),
            np.array(outputs, np.int8),
        )

    def part(self, start: int, stop: int) -> Batch:
        """Its tokens from `start` to before `stop`."""
        here = slice(start, stop)
        return Batch(
            self.tokens[here],
            self.positions[here],
            self.sequence_ids[here],
            self.outputs[here],
        )


@dataclass(frozen=True)
class EmbeddingCapacity:
    """How much can be embedded at a time: `sequences` texts of `longest` tokens or less, in batches
    of `TEXT_BATCH`, and `cells` tokens of texts that are not complete.  If `whole`, a text has to
    be in one batch, which then may be as long as it is."""

    longest: int
    sequences: int
    cells: int
    whole: bool = False


@dataclass(frozen=True)
class ImagePiece:
    """Part of an image as a prompt has it: `tokens` of the text around it, or else `cells` that the
    projector fills, after which the next position is `advance` further."""

    tokens: tuple[int, ...] = ()
    cells: int = 0
    advance: int = 0


@dataclass(frozen=True)
class EncodedPiece:
    """What a projector made of a piece: `embeddings`, shape (cells, n); and `positions` in each
    dimension that the model has, relative to the piece's own, shape (dimensions, cells).  Unless
    it is `causal`, all of it has to be computed at a time, each cell with attention to all."""

    embeddings: Float32
    positions: Int32
    causal: bool = True

    def part(self, start: int, stop: int) -> EncodedPiece:
        """Its cells from `start` to before `stop`."""
        here = slice(start, stop)
        return EncodedPiece(self.embeddings[here], self.positions[:, here], self.causal)


class Projector(Protocol):
    """What makes a model see images."""

    @property
    def digest(self) -> str:
        """Of its file: SHA-256 in hex."""

    def pieces(self, width: int, height: int) -> list[ImagePiece]:
        """What an image of that size takes in a prompt.  For any thread.  Raises BoxError."""

    def encode(self, width: int, height: int, rgb: bytes) -> list[EncodedPiece]:
        """The pieces of an image that have cells, in order.  Takes long, beside `decode` of the
        same runner; for one thread.  Raises BoxError."""


class KVCells(Protocol):
    """The cells of the KV cache, by sequence id.  A sequence has one for each position, unless it
    has images: theirs may have positions in common."""

    def remove(self, sequence_id: int) -> None:
        """Free every cell of a sequence."""

    def truncate(self, sequence_id: int, length: int) -> None:
        """Free the cells of a sequence from position `length` (which is not 0) on."""

    def copy(self, source: int, target: int, length: int) -> None:
        """Give the empty sequence `target` the cells of `source` before position `length`."""


class Runner(KVCells, Protocol):
    @property
    def facts(self) -> ModelFacts: ...

    @property
    def projector(self) -> Projector | None:
        """None if the model sees no images."""

    def tokenize(self, text: str, limit: int | None = None, *, special: bool = True) -> list[int]:
        """Tokens of a prompt, with those that the vocabulary puts around one; unless it is not
        `special`, control tokens in it are recognised.  Raises TooManyTokens for more than
        `limit`."""

    def tokenize_text(
        self, text: str, limit: int | None = None, *, special: bool = False
    ) -> list[int]:
        """Tokens of a piece of text alone.  Raises TooManyTokens."""

    def min_token_count(self, text: str) -> int:
        """A number of tokens that the text has at least, without tokenizing it."""

    def piece(self, token: int) -> bytes:
        """Bytes of a token as text; empty for control tokens."""

    def spelling(self, token: int) -> bytes:
        """The same, but control tokens as a prompt has them."""

    def vocabulary(self) -> Vocabulary:
        """For comparing it with that of another model; reading it takes a moment."""

    def decode(self, batch: Batch) -> Float32:
        """Compute the batch; returns logits, shape (number of outputs, n_vocab), in batch order.

        The array is valid until the next call.  Raises NoSlot.
        """

    def decode_image(self, piece: EncodedPiece, position: int, sequence_id: int) -> None:
        """Compute (a part of) a piece of an image that begins at that position of the sequence.
        Raises NoSlot."""

    def state(self, sequence_id: int, max_bytes: int) -> memoryview | None:
        """What the cells of a sequence hold, for `restore`; None if that is more."""

    def restore(self, sequence_id: int, state: bytearray) -> bool:
        """Give an empty sequence such cells.  Returns False if that is not possible."""

    def prepare_embedding(self, size: int) -> EmbeddingCapacity:
        """Make room for texts of `size` tokens and what is shorter; what was computed of others is
        gone.  Raises BoxError."""

    def embed(self, batch: Batch, ended: Sequence[int]) -> Float32:
        """Compute texts, or parts that go on where the last one ended: the sum of the last hidden
        states of each sequence in the batch, or what the model makes of the whole, in the batch's
        order; shape (sequences, n_embd).  Before that, free the cells of the sequence ids `ended`.
        Leaves what `decode` computes alone.  Raises BoxError."""
