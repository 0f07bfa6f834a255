"""Embeddings by llama.cpp: a small context of its own beside the one that generates.

A model that says how it pools (`llama_pooling_type`) is read whole, as it was trained; others are
read in pieces, and the mean of the last hidden states is taken, as llama.cpp's mean pooling does.
"""

from __future__ import annotations

import ctypes
from typing import Any

import llama_cpp.llama_cpp as llama
import numpy as np
import numpy.typing as npt

from pinaivu_box.engine.llama_batch import BatchBuffer
from pinaivu_box.engine.runner import Batch
from pinaivu_box.errors import BoxError

_PIECE = 256  # tokens; every token of a piece gives a hidden state
_MOST_WHOLE = 8192  # tokens of a text that is pooled by llama.cpp


class Embedder:
    """Not thread-safe: the thread that drives the runner drives it."""

    def __init__(self, model: llama.llama_model_p, context: int, threads: int) -> None:
        self._pools = self._pooling(model)
        params = llama.llama_context_default_params()
        params.n_ctx = min(context, _MOST_WHOLE) if self._pools else context
        params.n_batch = params.n_ubatch = params.n_ctx if self._pools else _PIECE
        params.n_threads = params.n_threads_batch = threads
        params.embeddings = True
        params.no_perf = True
        if not self._pools:
            params.pooling_type = llama.LLAMA_POOLING_TYPE_NONE
        made = llama.llama_init_from_model(model, params)
        if not made:
            raise BoxError("llama.cpp cannot make a context for embeddings: memory may be short.")
        self._context = made
        self._memory = llama.llama_get_memory(made)
        self._size = llama.llama_model_n_embd(model)
        self._piece = params.n_batch
        self._buffer = BatchBuffer(self._piece)

    @staticmethod
    def _pooling(model: llama.llama_model_p) -> bool:
        arch = _meta(model, "general.architecture")
        return _meta(model, f"{arch}.pooling_type") not in ("", "0")

    def embed(self, tokens: list[int]) -> npt.NDArray[np.float32]:
        """The text's vector, of length 1."""
        if self._memory:
            llama.llama_memory_clear(self._memory, True)
        total = np.zeros(self._size, np.float64)
        for start in range(0, len(tokens), self._piece):
            total += self._read(tokens[start : start + self._piece], start)
        return (total / max(float(np.linalg.norm(total)), 1e-12)).astype(np.float32)

    def close(self) -> None:
        llama.llama_free(self._context)

    def _read(self, tokens: list[int], start: int) -> npt.NDArray[np.float64]:
        """The sum of the hidden states, or what the model pools."""
        count = len(tokens)
        batch = Batch(
            np.array(tokens, np.int32),
            np.arange(start, start + count, dtype=np.int32),
            np.zeros(count, np.int32),
            np.ones(count, np.int8),
        )
        if llama.llama_decode(self._context, self._buffer.fill(batch)) != 0:
            raise BoxError("llama.cpp could not compute an embedding.")
        if self._pools:
            pooled = llama.llama_get_embeddings_seq(self._context, 0)
            return _array(pooled, (self._size,)).astype(np.float64)
        states = llama.llama_get_embeddings(self._context)
        return np.asarray(_array(states, (count, self._size)).sum(axis=0, dtype=np.float64))


def _array(pointer: Any, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    return np.ctypeslib.as_array(pointer, shape=shape)


def _meta(model: llama.llama_model_p, key: str) -> str:
    buffer = ctypes.create_string_buffer(64)
    length = llama.llama_model_meta_val_str(model, key.encode(), buffer, len(buffer))
    return buffer.value.decode() if length > 0 else ""
