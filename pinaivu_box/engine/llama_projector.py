"""llama.cpp's mtmd behind the projector protocol: from pixels to what a model reads.

mtmd says how an image is cut into pieces and what text stands around them, and computes their
embeddings; where those go in the KV cache is the scheduler's business.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator
from pathlib import Path

import llama_cpp.llama_cpp as llama
import llama_cpp.mtmd_cpp as mtmd
import numpy as np
from numpy.ctypeslib import as_array

from pinaivu_box.engine.image_decoding import MAX_SIDE
from pinaivu_box.engine.llama_log import LlamaLog
from pinaivu_box.engine.messages import LoadModel
from pinaivu_box.engine.runner import EncodedPiece, Float32, ImagePiece, Int32
from pinaivu_box.errors import BadRequest, BoxError

_TEXT = 0  # MTMD_INPUT_CHUNK_TYPE_TEXT
_DIMENSIONS = 4  # of positions in M-RoPE: time, height, width, and one that is not used
_SIZES = ((MAX_SIDE, MAX_SIDE), (MAX_SIDE, MAX_SIDE // 8), (MAX_SIDE // 8, MAX_SIDE), (64, 64))


class ProjectorFailed(BoxError):
    """llama.cpp cannot load a projector, or not for this model; its log may say why."""


class LlamaProjector:
    """On that device (ggml's pointer), or the CPU.  Raises ProjectorFailed."""

    def __init__(
        self,
        load: LoadModel,
        model: llama.llama_model_p,
        threads: int,
        device: int | None,
        log: LlamaLog,
    ) -> None:
        self.digest = load.projector_digest
        self._log, self._log_callback = log, llama.llama_log_callback(log)  # C holds the second
        mtmd.mtmd_helper_log_set(self._log_callback, None)
        self._size = llama.llama_model_n_embd_inp(model)
        name = Path(load.projector).name
        params = mtmd.mtmd_context_params_default()
        params.n_threads = threads
        params.print_timings = False
        params.use_gpu, params.device = device is not None, device
        params.warmup = False  # the first image pays for it, not each start of the model
        self._context = mtmd.mtmd_init_from_file(os.fsencode(load.projector), model, params)
        if not self._context:
            raise ProjectorFailed(f"llama.cpp cannot load the projector {name} of this model")
        if not mtmd.mtmd_support_vision(self._context):
            raise ProjectorFailed(f'{name} is no projector for images (set projector = "none")')
        self._dimensions = _DIMENSIONS if mtmd.mtmd_decode_use_mrope(self._context) else 1
        self._causal = not mtmd.mtmd_decode_use_non_causal(self._context, None)

    @property
    def most_cells_at_once(self) -> int:
        """Of pieces that have to be computed in one batch, 0 if they need not."""
        if self._causal:
            return 0
        pieces = (piece for size in _SIZES for piece in self.pieces(*size))
        return max(piece.cells for piece in pieces)

    def pieces(self, width: int, height: int) -> list[ImagePiece]:
        with self._chunks(width, height, None) as chunks:
            return [self._piece(chunk) for chunk in chunks]

    def encode(self, width: int, height: int, rgb: bytes) -> list[EncodedPiece]:
        with self._chunks(width, height, rgb) as chunks:
            return [self._encoded(chunk) for chunk in chunks if _kind(chunk) != _TEXT]

    def close(self) -> None:
        mtmd.mtmd_free(self._context)

    @contextlib.contextmanager
    def _chunks(self, width: int, height: int, rgb: bytes | None) -> Iterator[list[int]]:
        """mtmd's chunks of an image; without pixels they only have sizes."""
        pixels = None
        if rgb is not None:  # mtmd copies them
            lines = np.frombuffer(rgb, np.uint8).reshape(height, width, 3)
            pixels = lines.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        bitmap = mtmd.mtmd_bitmap_init(width, height, pixels)
        chunks = mtmd.mtmd_input_chunks_init()
        try:
            part = mtmd.mtmd_input_part(None, bitmap)
            parts = (ctypes.POINTER(mtmd.mtmd_input_part) * 1)(ctypes.pointer(part))
            if mtmd.mtmd_tokenize_from_parts(self._context, chunks, parts, 1, False) != 0:
                raise BadRequest(
                    f"The projector cannot read an image of {width} x {height} pixels: send it in "
                    "another size.",
                    param="messages",
                )
            count = mtmd.mtmd_input_chunks_size(chunks)
            yield [mtmd.mtmd_input_chunks_get(chunks, number) for number in range(count)]
        finally:
            mtmd.mtmd_input_chunks_free(chunks)
            mtmd.mtmd_bitmap_free(bitmap)

    def _piece(self, chunk: int) -> ImagePiece:
        if _kind(chunk) == _TEXT:
            count = ctypes.c_size_t()
            tokens = mtmd.mtmd_input_chunk_get_tokens_text(chunk, ctypes.byref(count))
            return ImagePiece(tuple(tokens[: count.value]))
        cells = mtmd.mtmd_input_chunk_get_n_tokens(chunk)
        return ImagePiece((), cells, mtmd.mtmd_input_chunk_get_n_pos(chunk))

    def _encoded(self, chunk: int) -> EncodedPiece:
        if mtmd.mtmd_encode_chunk(self._context, chunk) != 0:
            raise BoxError(f"The projector failed on an image: {self._log.last or 'no reason'}.")
        cells = mtmd.mtmd_input_chunk_get_n_tokens(chunk)
        made = mtmd.mtmd_get_output_embd(self._context)
        embeddings: Float32 = as_array(made, (cells, self._size)).copy()
        return EncodedPiece(embeddings, self._positions(chunk, cells), self._causal)

    def _positions(self, chunk: int, cells: int) -> Int32:
        if self._dimensions == 1:
            return np.arange(cells, dtype=np.int32)[np.newaxis]
        tokens = mtmd.mtmd_input_chunk_get_tokens_image(chunk)
        positions = (mtmd.mtmd_decoder_pos * cells)()
        mtmd.mtmd_helper_image_get_decoder_pos(tokens, 0, positions)
        return np.array([[p.t, p.y, p.x, p.z] for p in positions], np.int32).T.copy()


def _kind(chunk: int) -> int:
    return int(mtmd.mtmd_input_chunk_get_type(chunk))
