"""What llama.cpp's own helper for images computes, to compare with."""

from __future__ import annotations

import ctypes

import llama_cpp.llama_cpp as llama
import llama_cpp.mtmd_cpp as mtmd
import numpy as np
import numpy.typing as npt

from pinaivu_box.engine.images import FIRST_IMAGE_TOKEN
from pinaivu_box.engine.llama_runner import LlamaRunner


def logits_after(
    runner: LlamaRunner, prompt: list[int], width: int, height: int, rgb: bytes
) -> npt.NDArray[np.float32]:
    """The logits after a prompt of text around one image, computed by `mtmd_helper` as a sequence
    of its own, which is removed."""
    projector = runner.projector
    assert projector is not None
    cells = [number for number, token in enumerate(prompt) if token >= FIRST_IMAGE_TOKEN]
    past = ctypes.c_int32(0)
    with projector._chunks(width, height, rgb) as chunks:
        (image,) = (each for each in chunks if mtmd.mtmd_input_chunk_get_type(each) != 0)
        _decode(runner, prompt[: cells[0]], 0)
        result = mtmd.mtmd_helper_eval_chunk_single(
            projector._context, runner._context, image, cells[0], 0, 512, False, ctypes.byref(past)
        )
        assert result == 0
    logits = _decode(runner, prompt[cells[-1] + 1 :], past.value)
    runner.remove(0)
    return logits


def _decode(runner: LlamaRunner, tokens: list[int], position: int) -> npt.NDArray[np.float32]:
    batch = llama.llama_batch_init(len(tokens), 0, 1)
    try:
        batch.n_tokens = len(tokens)
        for number, token in enumerate(tokens):
            batch.token[number], batch.pos[number] = token, position + number
            batch.n_seq_id[number], batch.seq_id[number][0] = 1, 0
            batch.logits[number] = number == len(tokens) - 1
        assert llama.llama_decode(runner._context, batch) == 0
        found = llama.llama_get_logits_ith(runner._context, -1)
        return np.ctypeslib.as_array(found, (runner.facts.n_vocab,)).copy()
    finally:
        llama.llama_batch_free(batch)
