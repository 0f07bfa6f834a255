"""A runner without a model: for tests of everything around it and for measuring overhead.

A model whose path is `fake:MS` is served by it: each step takes MS milliseconds outside the GIL.
It speaks bytes (token n is byte n) and answers with a fixed sentence, over and over, so that any
position's token is known beforehand.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from pinaivu_box.engine.messages import LoadModel
from pinaivu_box.engine.own_templates import CHATML
from pinaivu_box.engine.runner import (
    TEXT_BATCH,
    Batch,
    EmbeddingCapacity,
    EncodedPiece,
    Float32,
    ModelFacts,
    Projector,
    TooManyTokens,
)
from pinaivu_box.engine.vocabulary import Vocabulary

SCHEME = "fake:"
SENTENCE = b"The quick brown fox jumps over the lazy dog. "
END = 256
N_VOCAB = 257
_MAX_TEXTS = 64  # at a time
_SENTENCE = np.frombuffer(SENTENCE, np.uint8)
UNLIKELY = np.linspace(-30, -31, N_VOCAB, dtype=np.float32)


class FakeRunner:
    projector: Projector | None = None

    def __init__(self, load: LoadModel) -> None:
        self._step_seconds = float(load.path.removeprefix(SCHEME) or 0) / 1000
        self.facts = ModelFacts(
            build="fake",
            device="none",
            context=load.context,
            kv_tokens=load.kv_tokens,
            max_sequences=load.max_sequences,
            n_vocab=N_VOCAB,
            n_embd=N_VOCAB,
            chat_template=load.template or CHATML,
            bos="",
            eos="",
            end_tokens=frozenset({END}),
        )

    def tokenize(self, text: str, limit: int | None = None, *, special: bool = True) -> list[int]:
        return self.tokenize_text(text, limit, special=special)

    def tokenize_text(
        self, text: str, limit: int | None = None, *, special: bool = False
    ) -> list[int]:
        data = text.encode()
        if limit is not None and len(data) > limit:
            raise TooManyTokens(len(data))
        return list(data)

    def min_token_count(self, text: str) -> int:
        return len(text.encode())

    def piece(self, token: int) -> bytes:
        return bytes([token]) if token < END else b""

    def spelling(self, token: int) -> bytes:
        return self.piece(token)

    def vocabulary(self) -> Vocabulary:
        return Vocabulary(0, None, None, [self.piece(token) for token in range(N_VOCAB)])

    def decode(self, batch: Batch) -> Float32:
        if self._step_seconds:
            time.sleep(self._step_seconds)
        positions = batch.positions[batch.outputs != 0]
        logits = np.tile(UNLIKELY, (len(positions), 1))
        logits[np.arange(len(positions)), _SENTENCE[positions % len(_SENTENCE)]] = 0.0
        return logits

    def decode_image(self, piece: EncodedPiece, position: int, sequence_id: int) -> None:
        raise NotImplementedError("it sees no images")

    def remove(self, sequence_id: int) -> None:
        return None

    def truncate(self, sequence_id: int, length: int) -> None:
        return None

    def copy(self, source: int, target: int, length: int) -> None:
        return None

    def state(self, sequence_id: int, max_bytes: int) -> memoryview | None:
        return memoryview(b"")

    def restore(self, sequence_id: int, state: bytearray) -> bool:
        return not state

    def prepare_embedding(self, size: int) -> EmbeddingCapacity:
        context = self.facts.context
        return EmbeddingCapacity(context, _MAX_TEXTS, context + TEXT_BATCH)

    def embed(self, batch: Batch, ended: Sequence[int]) -> Float32:
        """How often each byte is there."""
        if self._step_seconds:
            time.sleep(self._step_seconds)
        sums = [
            np.bincount(batch.tokens[batch.sequence_ids == sequence_id], minlength=N_VOCAB)
            for sequence_id in dict.fromkeys(batch.sequence_ids.tolist())
        ]
        return np.array(sums, np.float32)
