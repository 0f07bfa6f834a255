"""llama.cpp's batch, filled from numpy."""

from __future__ import annotations

import ctypes
from typing import Any

import llama_cpp.llama_cpp as llama
import numpy as np
import numpy.typing as npt

from pinaivu_box.engine.runner import Batch


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
        self._sequence_ids[:count] = batch.sequence_ids
        self._outputs[:count] = batch.outputs
        self._batch.n_tokens = count
        return self._batch


def _pointer(array: npt.NDArray[Any], kind: type) -> Any:
    return ctypes.cast(array.ctypes.data, ctypes.POINTER(kind))
