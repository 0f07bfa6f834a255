"""llama.cpp's batch, filled from numpy, and its logits as numpy sees them."""

from __future__ import annotations

import ctypes
from typing import Any

import llama_cpp.llama_cpp as llama
import numpy as np
import numpy.typing as npt
from numpy.ctypeslib import as_array

from pinaivu_box.engine.runner import Batch, EncodedPiece, Float32


class BatchBuffer:
    """A `llama_batch` whose arrays are numpy's, so that filling it is a few copies."""

    def __init__(self, size: int) -> None:
        self._tokens = np.zeros(size, np.int32)
        self._positions = np.zeros(size, np.int32)
        self._counts = np.ones(size, np.int32)
        self._sequence_ids = np.zeros(size, np.int32)
        self._outputs = np.zeros(size, np.int8)
        # seq_id is an array of pointers, one to each token's (single) sequence id.
        self._pointers = (
            self._sequence_ids.ctypes.data + np.arange(size, dtype=np.uint64) * 4
        ).astype(np.uint64)
        self._filled: Batch | None = None
        self.outputs = 0  # how many logits are wanted
        self._batch = llama.llama_batch()
        self._batch.token = _pointer(self._tokens, llama.llama_token)
        self._batch.embd = None
        self._batch.pos = _pointer(self._positions, llama.llama_pos)
        self._batch.n_seq_id = _pointer(self._counts, ctypes.c_int32)
        self._batch.seq_id = _pointer(self._pointers, ctypes.POINTER(llama.llama_seq_id))
        self._batch.logits = _pointer(self._outputs, ctypes.c_int8)

    def fill(self, batch: Batch) -> llama.llama_batch:
        count = len(batch.tokens)
        self._tokens[:count] = batch.tokens
        self._positions[:count] = batch.positions
        if batch is not self._filled:  # in steady steps nothing else changes
            self._filled = batch
            self._sequence_ids[:count] = batch.sequence_ids
            self._outputs[:count] = batch.outputs
            self._batch.n_tokens = count
            self.outputs = int(np.count_nonzero(batch.outputs))
        return self._batch


class LogitsView:
    """The logits of a context's last batch, where llama.cpp has them."""

    def __init__(self, context: llama.llama_context_p, n_vocab: int) -> None:
        prototype = ctypes.CFUNCTYPE(ctypes.c_void_p, llama.llama_context_p_ctypes)
        self._get = prototype(("llama_get_logits", llama._lib))
        self._context = context
        self._n_vocab = n_vocab
        self._address = 0
        self._view: Float32 = np.empty((0, n_vocab), np.float32)

    def rows(self, count: int) -> Float32:
        """The first so many, shape (count, n_vocab); valid until the next batch."""
        address = self._get(self._context)
        # It mostly stays where it is, and making an array of an address takes longer than this.
        if address != self._address or count > len(self._view):
            floats = (ctypes.c_float * (count * self._n_vocab)).from_address(address)
            self._view = as_array(floats).reshape(count, self._n_vocab)
            self._address = address
        return self._view[:count]


class ImageBatch:
    """A `llama_batch` of a piece of an image that begins at that position of a sequence: it has no
    tokens, and no logits are wanted of it."""

    def __init__(self, piece: EncodedPiece, position: int, sequence_id: int) -> None:
        count = len(piece.embeddings)
        self._embeddings = np.ascontiguousarray(piece.embeddings, np.float32)
        self._positions = np.array(piece.positions, np.int32, order="C")  # a copy
        # The last of the dimensions of M-RoPE is not used.
        self._positions[:3] += position
        self._sequence_ids = np.full(count, sequence_id, np.int32)
        addresses = self._sequence_ids.ctypes.data + np.arange(count, dtype=np.uint64) * 4
        self._pointers = addresses.astype(np.uint64)
        self._counts, self._outputs = np.ones(count, np.int32), np.zeros(count, np.int8)
        self.batch = llama.llama_batch()
        self.batch.n_tokens = count
        self.batch.token = None
        self.batch.embd = _pointer(self._embeddings, ctypes.c_float)
        self.batch.pos = _pointer(self._positions, llama.llama_pos)
        self.batch.n_seq_id = _pointer(self._counts, ctypes.c_int32)
        self.batch.seq_id = _pointer(self._pointers, ctypes.POINTER(llama.llama_seq_id))
        self.batch.logits = _pointer(self._outputs, ctypes.c_int8)


def _pointer(array: npt.NDArray[Any], kind: type) -> Any:
    return ctypes.cast(array.ctypes.data, ctypes.POINTER(kind))
