"""llama.cpp behind the runner protocol: the only module that imports llama_cpp.

Low-level API only: multi-sequence `llama_decode`.

The KV cache is *unified* (one pool of cells that all sequences share) unless every sequence can
have its whole context at the same time: then each has a *stream* of its own.  In a stream,
attention looks at the cells of its own sequence only; in the pool it passes over everybody's, which
costs more the more sequences run.  The pool in turn lets a few long sequences have what many short
ones do not need, and shares a prefix without copying it.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from functools import cache, cached_property
from itertools import pairwise
from pathlib import Path

import llama_cpp.llama_cpp as llama
import numpy as np

from pinaivu_box.engine.llama_batch import BatchBuffer
from pinaivu_box.engine.llama_embedder import Embedder, metadata
from pinaivu_box.engine.messages import LoadModel, SamplingDefaults
from pinaivu_box.engine.runner import (
    Batch,
    EmbeddingCapacity,
    Float32,
    ModelFacts,
    NoSlot,
    TooManyTokens,
)
from pinaivu_box.errors import BoxError

_WARNING, _ERROR, _CONTINUED = 3, 4, 5  # ggml_log_level; lower levels are left out
_LOAD_FAILED = "failed to load model"
_MAX_SEQUENCE_IDS = 256  # LLAMA_MAX_SEQ
_TILE_TOKENS = 64  # GGML_FA_TILE_Q
_MAX_TOP_K = 2**31 - 1
_SPELLED_OUT = (1, 2)  # LLAMA_VOCAB_TYPE_SPM, _BPE: the tokens' bytes are the text's
_IF_TOOLS = "{% if tools or messages | selectattr('role', 'equalto', 'tool') | list %}"
_NO_SLOT = 1  # llama_decode: could not find a KV slot for the batch


class LlamaRunner:
    """One model and one context.  Not thread-safe: one thread drives it."""

    def __init__(self, load: LoadModel) -> None:
        _load_backends()
        self._log = _capture_log()
        self._threads = load.threads or physical_cores()
        self._model = self._load_model(load)
        self._vocab = llama.llama_model_get_vocab(self._model)
        self._context = self._make_context(load)
        self._memory = llama.llama_get_memory(self._context)
        self._n_vocab = llama.llama_vocab_n_tokens(self._vocab)
        self._batch = BatchBuffer(llama.llama_n_batch(self._context))
        self.piece = cache(self._read_piece)
        self._embedder: Embedder | None = None  # made when texts are to be embedded
        self.facts = self._read_facts(load)

    # -- loading -------------------------------------------------------------------------------

    def _load_model(self, load: LoadModel) -> llama.llama_model_p:
        params = llama.llama_model_default_params()
        if load.offset:
            model = _load_from_offset(load.path, load.offset, params)
        else:  # all parts by name: llama.cpp would look for names that end in lower case
            paths = load.parts or [load.path]
            names = (ctypes.c_char_p * len(paths))(*map(os.fsencode, paths))
            model = llama.llama_model_load_from_splits(names, len(paths), params)
        if not model:
            raise BoxError(
                f"llama.cpp cannot load {Path(load.path).name}: "
                f"{self._log.last or 'no reason given'}"
            )
        return model

    def _make_context(self, load: LoadModel) -> llama.llama_context_p:
        params = llama.llama_context_default_params()
        self._unified = load.max_sequences * load.context > load.kv_tokens
        params.n_ctx = load.kv_tokens if self._unified else load.max_sequences * load.context
        params.n_batch = max(load.token_budget, load.max_sequences)
        params.n_ubatch = min(params.n_batch, 512)
        # In the pool an id costs nothing, and those of no running sequence keep finished prefixes.
        params.n_seq_max = _MAX_SEQUENCE_IDS if self._unified else load.max_sequences
        params.n_threads = params.n_threads_batch = self._threads
        params.kv_unified = self._unified
        params.no_perf = True
        context = llama.llama_init_from_model(self._model, params)
        if not context:
            raise BoxError(
                f"llama.cpp cannot make a context of {params.n_ctx} tokens: "
                f"{self._log.last or 'no reason given'}; lower engine.kv_tokens"
            )
        self._max_length = min(load.context, llama.llama_n_ctx_seq(context))
        return context

    def _read_facts(self, load: LoadModel) -> ModelFacts:
        vocab = self._vocab
        ends = [t for t in range(self._n_vocab) if llama.llama_vocab_is_eog(vocab, t)]
        return ModelFacts(
            build=f"llama.cpp {llama.llama_version().decode()}",
            device=_device_name(),
            context=self._max_length,
            kv_tokens=llama.llama_n_ctx(self._context),
            max_sequences=load.max_sequences,
            sequence_ids=llama.llama_n_seq_max(self._context),
            # split_equal puts ids into one graph only if each is the one before it plus 1.
            streams=not self._unified,
            # Recurrent and hybrid models keep a state that cannot be cut: nothing to share there.
            sharing=not (
                llama.llama_model_is_recurrent(self._model)
                or llama.llama_model_is_hybrid(self._model)
            ),
            n_vocab=self._n_vocab,
            n_embd=llama.llama_model_n_embd(self._model),
            chat_template=self._chat_template(),
            bos=self._token_text(llama.llama_vocab_bos(vocab)),
            eos=self._token_text(llama.llama_vocab_eos(vocab)),
            end_tokens=frozenset(ends),
            infill=self._infill(),
            controls=self._controls(),
            defaults=self._sampling_defaults(),
        )

    def _chat_template(self) -> str | None:
        """The file's template; Command R and Hermes have another for tools."""
        names = (None, b"tool_use")
        sources = [llama.llama_model_chat_template(self._model, name) for name in names]
        # For some files llama.cpp names one of its own formats, which is no template.
        plain, for_tools = (
            source.decode(errors="replace") if source and b"{" in source else None
            for source in sources
        )
        if plain is None or for_tools is None:
            return for_tools or plain
        # Jinja drops a template's last newline.
        for_tools, plain = for_tools.removesuffix("\n"), plain.removesuffix("\n")
        return f"{_IF_TOOLS}{for_tools}{{% else %}}{plain}{{% endif %}}"

    def _infill(self) -> tuple[int, int, int] | None:
        tokens = (
            llama.llama_vocab_fim_pre(self._vocab),
            llama.llama_vocab_fim_suf(self._vocab),
            llama.llama_vocab_fim_mid(self._vocab),
        )
        return None if min(tokens) < 0 else tokens

    def _controls(self) -> tuple[str, ...]:
        """Texts that llama.cpp reads as a token only where special tokens are parsed."""
        special = llama.LLAMA_TOKEN_ATTR_CONTROL | llama.LLAMA_TOKEN_ATTR_UNKNOWN
        return tuple(
            self._token_text(token)
            for token in range(self._n_vocab)
            if llama.llama_vocab_get_attr(self._vocab, token) & special
        )

    def _sampling_defaults(self) -> SamplingDefaults:
        """The file's own defaults; values that no request could have count as absent."""

        def value(key: str, minimum: float, maximum: float) -> float | None:
            try:
                number = float(metadata(self._model, f"general.sampling.{key}"))
            except ValueError:
                return None
            return number if minimum <= number <= maximum else None  # also None for NaN

        top_k = value("top_k", 0, _MAX_TOP_K)
        top_p = value("top_p", 0, 1)
        min_p = value("min_p", 0, 1)
        return SamplingDefaults(
            temperature=value("temp", 0, 2),
            top_p=top_p or None,  # more than 0, and the other less than 1
            top_k=None if top_k is None else int(top_k),
            min_p=None if min_p == 1 else min_p,
        )

    def _token_text(self, token: int) -> str:
        if token < 0:  # LLAMA_TOKEN_NULL
            return ""
        return str(llama.llama_vocab_get_text(self._vocab, token).decode(errors="replace"))

    # -- the protocol --------------------------------------------------------------------------

    def tokenize(self, text: str, limit: int | None = None, *, special: bool = True) -> list[int]:
        # Many templates write the BOS token themselves; a second one would harm the model.
        bos = self.facts.bos
        has_bos = special and bool(bos) and text.startswith(bos)
        return self._tokenize(text, limit, add_special=not has_bos, special=special)

    def tokenize_text(
        self, text: str, limit: int | None = None, *, special: bool = False
    ) -> list[int]:
        return self._tokenize(text, limit, add_special=False, special=special)

    def min_token_count(self, text: str) -> int:
        # Other kinds of vocabularies drop spaces, or have one token for a word that they do not
        # know, however long it is.
        if llama.llama_vocab_type(self._vocab) not in _SPELLED_OUT:
            return 0
        return len(text.encode()) // self._longest_piece

    @cached_property
    def _longest_piece(self) -> int:
        """Bytes.  Reading the whole vocabulary takes a moment, and only very long texts ask."""
        return max(1, *(len(self._read_piece(n, special=True)) for n in range(self._n_vocab)))

    def _tokenize(
        self, text: str, limit: int | None, *, add_special: bool, special: bool
    ) -> list[int]:
        data = text.encode()
        room = len(data) + 8 if limit is None else min(len(data) + 8, limit)
        while True:
            buffer = (llama.llama_token * room)()
            count = llama.llama_tokenize(
                self._vocab, data, len(data), buffer, room, add_special, special
            )
            if count >= 0:
                return list(buffer[:count])
            room = -count
            if limit is not None and room > limit:
                raise TooManyTokens(room)

    def spelling(self, token: int) -> bytes:
        return self.piece(token) or self._read_piece(token, special=True)

    def _read_piece(self, token: int, *, special: bool = False) -> bytes:
        room = 32
        while True:
            buffer = ctypes.create_string_buffer(room)
            length = llama.llama_token_to_piece(self._vocab, token, buffer, room, 0, special)
            if length >= 0:
                return buffer.raw[:length]
            room = -length

    def decode(self, batch: Batch) -> Float32:
        parts = self._parts(batch)
        if len(parts) == 1:
            return self._decode(batch)
        logits = []
        for number, part in enumerate(parts):
            try:
                logits.append(self._decode(part).copy())
            except NoSlot:
                for earlier in parts[:number]:
                    self._take_back(earlier)
                raise
        return np.concatenate(logits)

    def _parts(self, batch: Batch) -> list[Batch]:
        """llama.cpp's CPU attention works in tiles from 64 tokens on.  That is fast for a prompt;
        with the next tokens of many sequences in one pool it computes the attention of each to
        the cells of all, and throws nearly all of it away."""
        size, single = len(batch.tokens), batch.single
        if not self._unified or size < _TILE_TOKENS or single == 0:
            return [batch]
        cuts = [*range(0, single, _TILE_TOKENS - 1), single]
        if size - single < _TILE_TOKENS - (single - cuts[-2]):
            cuts.pop()  # the rest is so short that it goes with the last of them
        return [batch.part(a, b) for a, b in pairwise([*cuts, size]) if a < b]

    def _decode(self, batch: Batch) -> Float32:
        result = llama.llama_decode(self._context, self._batch.fill(batch))
        if result == _NO_SLOT:
            raise NoSlot
        if result != 0:
            raise BoxError(f"llama_decode failed with {result}: {self._log.last}")
        rows = int(np.count_nonzero(batch.outputs))
        if rows == 0:
            return np.empty((0, self._n_vocab), np.float32)
        logits = llama.llama_get_logits(self._context)
        return np.ctypeslib.as_array(logits, shape=(rows, self._n_vocab))

    def _take_back(self, batch: Batch) -> None:
        for sequence_id in np.unique(batch.sequence_ids):
            self.truncate(
                int(sequence_id), int(batch.positions[batch.sequence_ids == sequence_id].min())
            )

    def remove(self, sequence_id: int) -> None:
        llama.llama_memory_seq_rm(self._memory, sequence_id, -1, -1)

    def truncate(self, sequence_id: int, length: int) -> None:
        if not llama.llama_memory_seq_rm(self._memory, sequence_id, length, -1):
            raise BoxError(f"llama.cpp cannot cut sequence {sequence_id} to {length} tokens.")

    def copy(self, source: int, target: int, length: int) -> None:
        if self._unified:  # only marks the cells
            llama.llama_memory_seq_cp(self._memory, source, target, 0, length)
            return
        llama.llama_memory_seq_cp(self._memory, source, target, -1, -1)  # streams copy whole
        self.truncate(target, length)

    def prepare_embedding(self, size: int) -> EmbeddingCapacity:
        if self._embedder is not None:
            self._embedder.close()
            self._embedder = None
        self._embedder = Embedder(self._model, size, self._max_length, self._threads)
        return self._embedder.capacity

    def embed(self, batch: Batch, ended: Sequence[int]) -> Float32:
        if self._embedder is None:
            raise BoxError("There is no room for texts: prepare_embedding comes first.")
        return self._embedder.embed(batch, ended)

    def close(self) -> None:
        if self._embedder is not None:
            self._embedder.close()
        llama.llama_free(self._context)
        llama.llama_model_free(self._model)


def _load_backends() -> None:
    # With GGML_BACKEND_DL the CPU variants are libraries of their own; ggml picks the best one
    # that this machine can run.  A build with a fixed backend has nothing to load here.
    directory = Path(llama.__file__).parent / "lib"
    llama._lib.ggml_backend_load_all_from_path(os.fsencode(directory))
    llama.llama_backend_init()


def _load_from_offset(
    path: str, offset: int, params: llama.llama_model_params
) -> llama.llama_model_p | None:
    """Map a GGUF that lies inside another file, such as our own executable."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.fopen.restype = ctypes.c_void_p
    libc.fseeko.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int)
    libc.fclose.argtypes = (ctypes.c_void_p,)
    file = libc.fopen(os.fsencode(path), b"rb")
    if not file:
        raise BoxError(f"{path} cannot be opened: {os.strerror(ctypes.get_errno())}")
    try:
        if libc.fseeko(file, offset, os.SEEK_SET) != 0:
            raise BoxError(f"{path} is shorter than {offset} bytes")
        return llama.llama_model_load_from_file_ptr(file, params)
    finally:
        libc.fclose(file)


class _Log:
    """Keeps llama.cpp's last error for our messages, and forwards warnings to stderr.  The line
    that ends a failed load does not give the reason, which is in the line before."""

    def __init__(self) -> None:
        self.last = ""
        self._level = 0

    def __call__(self, level: int, text: bytes, _user_data: object) -> None:
        if level != _CONTINUED:  # else it goes on with the line before
            self._level = level
        if self._level not in (_WARNING, _ERROR):
            return
        line = text.decode(errors="replace").strip()
        if self._level == _ERROR and line and not (self.last and line.endswith(_LOAD_FAILED)):
            self.last = line
        os.write(2, text)


_kept_alive: list[object] = []  # C holds the callback for the life of the process


def _capture_log() -> _Log:
    log = _Log()
    callback = llama.llama_log_callback(log)
    _kept_alive.append(callback)
    llama.llama_log_set(callback, None)
    return log


def _device_name() -> str:
    lib = llama._lib
    lib.ggml_backend_dev_count.restype = ctypes.c_size_t
    lib.ggml_backend_dev_get.argtypes = (ctypes.c_size_t,)
    lib.ggml_backend_dev_get.restype = ctypes.c_void_p
    lib.ggml_backend_dev_description.argtypes = (ctypes.c_void_p,)
    lib.ggml_backend_dev_description.restype = ctypes.c_char_p
    devices = map(lib.ggml_backend_dev_get, range(lib.ggml_backend_dev_count()))
    return ", ".join(lib.ggml_backend_dev_description(device).decode() for device in devices)


def physical_cores() -> int:
    """Cores that this process may use, hyper-threads counted once (they do not help matmuls)."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    cores = set()
    for cpu in os.sched_getaffinity(0):
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        cores.add(siblings.read_text().strip() if siblings.exists() else str(cpu))
    return len(cores)
