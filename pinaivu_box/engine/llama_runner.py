"""llama.cpp behind the runner protocol.

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
import sys
import time
from collections.abc import Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import llama_cpp
import llama_cpp.llama_cpp as llama
import numpy as np

from pinaivu_box.engine import exactness, own_templates
from pinaivu_box.engine.llama_adapters import LoadedAdapters
from pinaivu_box.engine.llama_batch import BatchBuffer, ImageBatch, LogitsView
from pinaivu_box.engine.llama_devices import DeviceChoice, cache_type, cpu_library, load_backends
from pinaivu_box.engine.llama_embedder import Embedder, metadata
from pinaivu_box.engine.llama_log import capture_log
from pinaivu_box.engine.messages import (
    CPU,
    NOTICE,
    DeviceMemory,
    LoadModel,
    SamplingDefaults,
)
from pinaivu_box.engine.out_of_memory import EngineOutOfMemory
from pinaivu_box.engine.pace import Mode, Pace
from pinaivu_box.engine.patience import Patience, waited_seconds
from pinaivu_box.engine.runner import (
    Batch,
    EmbeddingCapacity,
    EncodedPiece,
    Float32,
    ModelFacts,
    NoSlot,
    TooManyTokens,
)
from pinaivu_box.engine.vocabulary import Vocabulary
from pinaivu_box.errors import BoxError
from pinaivu_box.processors import usable_cores
from pinaivu_box.text import number as number_of

if TYPE_CHECKING:
    from pinaivu_box.engine.llama_projector import LlamaProjector

_MAX_SEQUENCE_IDS = 256  # LLAMA_MAX_SEQ
_MAX_TOP_K = 2**31 - 1
_SPELLED_OUT = (1, 2)  # LLAMA_VOCAB_TYPE_SPM, _BPE: the tokens' bytes are the text's
_IF_TOOLS = "{% if tools or messages | selectattr('role', 'equalto', 'tool') | list %}"
_NO_SLOT = 1  # llama_decode: could not find a KV slot for the batch


class LlamaRunner:
    """One model and one context.  Not thread-safe: one thread drives it.

    With `simulate` it has no weights and no cache, and so cannot compute: it only tells what it
    would take.  Raises BoxError, EngineOutOfMemory.
    """

    def __init__(self, load: LoadModel, *, simulate: bool = False) -> None:
        load_backends(load.cpu_variant)
        self.log = self._log = capture_log()
        self._simulate = simulate
        self._devices = DeviceChoice(load)
        self._threads = load.threads or usable_cores()
        self._patience = Patience(self._threads)
        self._pace = Pace(self._threads, waited_seconds, adjustable=self._patience.adjustable)
        self._mode = self._pace.mode
        self.model = self._load_model(load)
        # Before the context: its graph has to have room for them.
        adapters = [] if simulate else load.adapters
        self._adapters = LoadedAdapters(self.model, adapters, self._log)
        self._vocab = llama.llama_model_get_vocab(self.model)
        self.projector = self._load_projector(load)
        self._context = self._make_context(load)
        self._memory = llama.llama_get_memory(self._context)
        self._n_vocab = llama.llama_vocab_n_tokens(self._vocab)
        self._batch = BatchBuffer(llama.llama_n_batch(self._context))
        self._logits = LogitsView(self._context, self._n_vocab)
        self.piece = cache(self._read_piece)
        self._embedder: Embedder | None = None  # made when texts are to be embedded
        if not simulate:
            self.facts = self._read_facts(load)

    # -- loading -------------------------------------------------------------------------------

    def _load_model(self, load: LoadModel) -> llama.llama_model_p:
        params = llama.llama_model_default_params()
        self._devices.apply(params)
        if self._simulate:
            params.no_alloc, params.load_mode = True, llama.LLAMA_LOAD_MODE_NONE
        if load.offset:
            model = _load_from_offset(load.path, load.offset, params)
        else:  # all parts by name: llama.cpp would look for names that end in lower case
            paths = load.parts or [load.path]
            names = (ctypes.c_char_p * len(paths))(*map(os.fsencode, paths))
            model = llama.llama_model_load_from_splits(names, len(paths), params)
        if not model:
            raise self._failure(f"llama.cpp cannot load {Path(load.path).name}")
        return model

    def _load_projector(self, load: LoadModel) -> LlamaProjector | None:
        if not load.projector or self._simulate:
            return None
        # Other models do not need its library.
        from pinaivu_box.engine.llama_projector import LlamaProjector, ProjectorFailed

        try:
            device = self._devices.for_images
            return LlamaProjector(load, self.model, self._threads, device, self._log)
        except ProjectorFailed as error:
            raise self._failure(error.message) from None

    def _failure(self, what: str) -> BoxError:
        if self._log.shortage is not None:
            return EngineOutOfMemory(what, self._log.shortage)
        return BoxError(f"{what}: {self._log.last or 'no reason given'}")

    @property
    def _has_states(self) -> bool:
        """Whether it is recurrent, wholly or in part."""
        return bool(
            llama.llama_model_is_recurrent(self.model) or llama.llama_model_is_hybrid(self.model)
        )

    @property
    def memory(self) -> list[DeviceMemory]:
        """What it has taken on each device."""
        return self._log.memory(self._devices.gpus)

    @property
    def _architecture(self) -> str:
        return metadata(self.model, "general.architecture")

    def _computing(self, load: LoadModel) -> list[str]:
        """The devices that have layers."""
        gpus = [each.device for each in self.memory if each.device != CPU and each.weights]
        layers = llama.llama_model_n_layer(self.model) + 1
        whole = gpus and (load.split == "tensor" or not 0 <= load.gpu_layers < layers)
        return gpus if whole else [*gpus, CPU]

    def _make_context(self, load: LoadModel) -> llama.llama_context_p:
        params = llama.llama_context_default_params()
        self._unified = load.max_sequences * load.context > load.kv_tokens
        setup = self._setup(load)
        self._exactness = exactness.of(load.exact, setup)
        if load.exact is True and setup.hindrance:
            raise BoxError(
                f'exact = true cannot be kept: {setup.hindrance}. With exact = "auto" the model '
                "is served without that promise."
            )
        params.n_ctx = load.kv_tokens if self._unified else load.max_sequences * load.context
        # In the pool an id costs nothing, and those of no running sequence keep finished prefixes;
        # but each of a recurrent model has a state.
        many = self._unified and not self._has_states
        params.n_seq_max = _MAX_SEQUENCE_IDS if many else load.max_sequences
        image_cells = self.projector.most_cells_at_once if self.projector is not None else 0
        # llama.cpp aborts if there are more ids than a batch has tokens, and on a piece of an image
        # that it would have to compute in parts.
        params.n_batch = max(load.token_budget, params.n_seq_max, image_cells)
        params.n_ubatch = max(min(params.n_batch, 512), image_cells)
        params.n_threads = params.n_threads_batch = self._threads
        params.kv_unified = self._unified
        params.type_k = params.type_v = cache_type(load)
        params.no_perf = True
        # Attention in separate steps is not exact, and takes BLAS.
        if self._exactness or self._devices.without_blas:
            params.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_ENABLED
        context = llama.llama_init_from_model(self.model, params)
        if not context:
            raise self._failure(f"llama.cpp cannot make a context of {params.n_ctx} tokens")
        self._adapters.apply(context)
        self._max_length = min(load.context, llama.llama_n_ctx_seq(context))
        return context

    def _setup(self, load: LoadModel) -> exactness.Setup:
        library = cpu_library()
        return exactness.Setup(
            weights=frozenset(self._log.tensor_types),
            variant=library.variant,
            build=_build(),
            fixed_split=library.fixed_split,
            kv_type=load.kv_type,
            plain=self._devices.only_plain_cpu,
            states=self._has_states,
            adapted=bool(load.adapters),
        )

    def _read_facts(self, load: LoadModel) -> ModelFacts:
        vocab = self._vocab
        ends = [t for t in range(self._n_vocab) if llama.llama_vocab_is_eog(vocab, t)]
        return ModelFacts(
            build=_build(),
            device=self._devices.described(self._computing(load)),
            memory=tuple(self.memory),
            context=self._max_length,
            kv_tokens=llama.llama_n_ctx(self._context),
            max_sequences=load.max_sequences,
            sequence_ids=llama.llama_n_seq_max(self._context),
            # split_equal puts ids into one graph only if each is the one before it plus 1.
            streams=not self._unified,
            # Recurrent and hybrid models keep a state that cannot be cut: nothing to share there.
            sharing=not self._has_states,
            n_vocab=self._n_vocab,
            n_embd=llama.llama_model_n_embd(self.model),
            chat_template=load.template or self._chat_template() or self._own_template(),
            bos=self._token_text(llama.llama_vocab_bos(vocab)),
            eos=self._token_text(llama.llama_vocab_eos(vocab)),
            end_tokens=frozenset(ends),
            infill=self._infill(),
            controls=self._controls(),
            defaults=self._sampling_defaults(),
            cells=self._cells(),
            exactness=self._exact_on(),
            cpu_variant=cpu_library().variant,
        )

    def _cells(self) -> str:
        """llama.cpp chooses LongRoPE's factors by the size of the context (`get_rope_factors`), and
        what it saves of a sequence knows the number of streams."""
        original = self._original_context or llama.llama_model_n_ctx_train(self.model)
        is_long = llama.llama_n_ctx_seq(self._context) > original
        streams = 1 if self._unified else llama.llama_n_seq_max(self._context)
        return f"{'long' if is_long else 'short'} {streams}"

    @property
    def _original_context(self) -> int:
        """Of a file whose context was made longer; 0 of others."""
        name = f"{self._architecture}.rope.scaling.original_context_length"
        return number_of(metadata(self.model, name)) or 0

    def _exact_on(self) -> str:
        """The exactness, which of such a file also depends on LongRoPE's factors (see `_cells`)."""
        is_long = 0 < self._original_context < llama.llama_n_ctx_seq(self._context)
        return f"{self._exactness} long" if self._exactness and is_long else self._exactness

    def _chat_template(self) -> str | None:
        """The file's template; Command R and Hermes have another for tools."""
        names = (None, b"tool_use")
        sources = [llama.llama_model_chat_template(self.model, name) for name in names]
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

    def _own_template(self) -> str | None:
        """Ours for the model's family."""
        tokens = set(map(self._token_text, range(self._n_vocab)))
        return own_templates.find(self._architecture, tokens.__contains__)

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
                number = float(metadata(self.model, f"general.sampling.{key}"))
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

    def vocabulary(self) -> Vocabulary:
        vocab = self._vocab
        bos = llama.llama_vocab_bos(vocab) if llama.llama_vocab_get_add_bos(vocab) else None
        eos = llama.llama_vocab_eos(vocab) if llama.llama_vocab_get_add_eos(vocab) else None
        texts = [llama.llama_vocab_get_text(vocab, token) for token in range(self._n_vocab)]
        return Vocabulary(llama.llama_vocab_type(vocab), bos, eos, texts)

    def decode(self, batch: Batch) -> Float32:
        filled = self._batch.fill(batch)
        if self._mode != self._pace.mode:
            self._change_mode(self._pace.mode)
        began = time.perf_counter()
        result = llama.llama_decode(self._context, filled)
        if self._pace.observe(len(batch.tokens), time.perf_counter() - began):
            self._say_busy()
        if result == _NO_SLOT:
            raise NoSlot
        if result != 0:
            raise self._decode_failure(result)
        rows = self._batch.outputs
        return self._logits.rows(rows) if rows else np.empty((0, self._n_vocab), np.float32)

    def _change_mode(self, mode: Mode) -> None:
        if mode.threads != self._mode.threads:
            llama.llama_set_n_threads(self._context, mode.threads, mode.threads)
        self._patience.set(patient=mode.patient)
        self._mode = mode

    def _say_busy(self) -> None:
        threads = self._pace.mode.threads
        if self._pace.busy:
            share = f"{self._pace.share:.0%} of their time its threads had no processor"
            text = f"the machine is busy: {share}; it computes with {threads} for now"
        else:
            text = f"the machine is quiet again: it computes with {threads} threads"
        sys.stderr.write(f"{NOTICE}{text}\n")
        sys.stderr.flush()

    def _decode_failure(self, result: int) -> BoxError:
        where = ", ".join(each.device for each in self.memory)
        why = self._log.last or "no reason given"
        return BoxError(f"computing on {where}: llama_decode failed with {result}: {why}")

    def decode_image(self, piece: EncodedPiece, position: int, sequence_id: int) -> None:
        batch = ImageBatch(piece, position, sequence_id)
        llama.llama_set_causal_attn(self._context, piece.causal)
        try:
            result = llama.llama_decode(self._context, batch.batch)
        finally:
            llama.llama_set_causal_attn(self._context, True)
        if result == _NO_SLOT:
            raise NoSlot
        if result != 0:
            raise self._decode_failure(result)

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

    def state(self, sequence_id: int, max_bytes: int) -> memoryview | None:
        size = llama.llama_state_seq_get_size(self._context, sequence_id)
        if size > max_bytes:
            return None
        data = np.empty(size, np.uint8)
        pointer = data.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        count = llama.llama_state_seq_get_data(self._context, pointer, size, sequence_id)
        return data[:count].data

    def restore(self, sequence_id: int, state: bytearray) -> bool:
        data = (ctypes.c_uint8 * len(state)).from_buffer(state)
        used = llama.llama_state_seq_set_data(self._context, data, len(state), sequence_id)
        return bool(used) and used == len(state)

    def prepare_embedding(self, size: int) -> EmbeddingCapacity:
        if self._embedder is not None:
            self._embedder.close()
            self._embedder = None
        self._embedder = Embedder(
            self.model,
            size,
            self._max_length,
            self._threads,
            self._adapters,
            without_blas=self._devices.without_blas,
        )
        return self._embedder.capacity

    def embed(self, batch: Batch, ended: Sequence[int]) -> Float32:
        if self._embedder is None:
            raise BoxError("There is no room for texts: prepare_embedding comes first.")
        return self._embedder.embed(batch, ended)

    def close(self) -> None:
        if self._embedder is not None:
            self._embedder.close()
        llama.llama_free(self._context)
        if self.projector is not None:
            self.projector.close()
        llama.llama_model_free(self.model)


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


def _build() -> str:
    """Names the source that the kernels were compiled from, with what `build/llama.patch` adds."""
    return f"llama-cpp-python {llama_cpp.__version__}"
