"""Embeddings by llama.cpp: a small context of its own beside the one that generates.

Several texts are several sequences of one batch.  A model that says how it pools
(`llama_pooling_type`) is read whole, as it was trained, so a text of it has to be in one batch;
others may be read in parts, and the mean of the last hidden states is taken, as llama.cpp's mean
pooling does.

Two things are different from a context that generates.  Flash attention is off, if that is not too
much memory: its kernels for few and for many rows round differently, and a vector should not depend
on what else is in the batch (of a Q8_0 file, cosines of 0.9997 with it, of 0.99998 without).  And
the graph ends at the hidden states: llama.cpp would go on to every token's logits, which nobody
wants; of SmolLM2 they are a fifth of the multiplications.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import llama_cpp.llama_cpp as llama
import numpy as np
from numpy.ctypeslib import as_array

from pinaivu_box.engine.llama_adapters import LoadedAdapters
from pinaivu_box.engine.llama_batch import BatchBuffer
from pinaivu_box.engine.runner import TEXT_BATCH, Batch, EmbeddingCapacity, Float32
from pinaivu_box.errors import BoxError

_MIN_CONTEXT_TOKENS = 2048
_MAX_TEXTS = 64
# Of the longest text for which attention is computed as a whole matrix.
_MAX_UNFUSED_TOKENS = 2048
# llama.cpp's name for what is wanted, also if nothing is pooled.
_RESULT_TENSOR = b"result_embd_pooled"
_MAX_STATEFUL_TEXTS = 4  # recurrent models have a whole state for each sequence


class Embedder:
    """For texts of `size` tokens at least, and of `context` at most.

    Not thread-safe: the thread that drives the runner drives it.  Raises BoxError.
    """

    def __init__(
        self,
        model: llama.llama_model_p,
        size: int,
        context: int,
        threads: int,
        adapters: LoadedAdapters,
        *,
        without_blas: bool = False,
    ) -> None:
        architecture = metadata(model, "general.architecture")
        self._pools = metadata(model, f"{architecture}.pooling_type") not in ("", "0")
        self.capacity = self._capacity(model, size, context)
        params = llama.llama_context_default_params()
        params.n_ctx = self.capacity.cells
        params.n_batch = params.n_ubatch = self.capacity.cells if self._pools else TEXT_BATCH
        params.n_seq_max = self.capacity.sequences
        params.kv_unified = True  # so that a long text may have what many short ones do not need
        params.n_threads = params.n_threads_batch = threads
        params.embeddings = True
        params.no_perf = True
        if not self._pools:
            params.pooling_type = llama.LLAMA_POOLING_TYPE_NONE
        if not self._pools or self.capacity.longest <= _MAX_UNFUSED_TOKENS:
            params.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_DISABLED
        if without_blas:  # which attention in separate steps takes on a GPU
            params.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_ENABLED
        self._tensor_name = llama._lib.ggml_get_name
        self._tensor_name.restype, self._tensor_name.argtypes = ctypes.c_char_p, [ctypes.c_void_p]
        self._callback = llama.ggml_backend_sched_eval_callback(self._stops)
        params.cb_eval = self._callback
        self._context = llama.llama_init_from_model(model, params)
        if not self._context:
            raise BoxError(
                f"There is not enough memory to embed texts of {self.capacity.longest} tokens: "
                "unload a model, or lower engine.context."
            )
        adapters.apply(self._context)
        self._memory = llama.llama_get_memory(self._context)
        self._size = llama.llama_model_n_embd(model)
        self._buffer = BatchBuffer(params.n_batch)

    def _stops(self, tensor: int, ask: bool, _user_data: object) -> bool:
        """llama.cpp asks before each tensor of the graph whether to stop after it (`ask`), and
        after it whether to go on."""
        return ask and self._tensor_name(tensor) == _RESULT_TENSOR

    def _capacity(self, model: llama.llama_model_p, size: int, context: int) -> EmbeddingCapacity:
        longest = min(context, max(_MIN_CONTEXT_TOKENS, 1 << (size - 1).bit_length()))
        stateful = llama.llama_model_is_recurrent(model) or llama.llama_model_is_hybrid(model)
        texts = _MAX_STATEFUL_TEXTS if stateful else _MAX_TEXTS
        cells = max(longest, TEXT_BATCH) if self._pools else longest + TEXT_BATCH
        return EmbeddingCapacity(longest, texts, cells, whole=self._pools)

    def embed(self, batch: Batch, ended: Sequence[int]) -> Float32:
        """As `runner.Runner.embed`."""
        count = len(batch.tokens)
        starts = np.flatnonzero(np.diff(batch.sequence_ids, prepend=-1))
        ids = batch.sequence_ids[starts].tolist()
        if self._memory:
            new = batch.sequence_ids[starts[batch.positions[starts] == 0]].tolist()
            for sequence_id in {*ended, *new}:
                llama.llama_memory_seq_rm(self._memory, sequence_id, -1, -1)
        if llama.llama_decode(self._context, self._buffer.fill(batch)) != 0:
            raise BoxError("llama.cpp could not compute an embedding.")
        if self._pools:
            pooled = (llama.llama_get_embeddings_seq(self._context, each) for each in ids)
            return np.stack([as_array(vector, (self._size,)) for vector in pooled])
        states = as_array(llama.llama_get_embeddings(self._context), (count, self._size))
        return np.add.reduceat(states, starts, axis=0, dtype=np.float64).astype(np.float32)

    def close(self) -> None:
        llama.llama_free(self._context)


def metadata(model: llama.llama_model_p, key: str) -> str:
    """A value of the file's header as text; empty if there is none."""
    buffer = ctypes.create_string_buffer(64)
    length = llama.llama_model_meta_val_str(model, key.encode(), buffer, len(buffer))
    return buffer.value.decode(errors="replace") if length > 0 else ""
