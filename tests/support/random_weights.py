"""Models of a shape with random weights: they say nonsense, and compute as real ones do."""

from __future__ import annotations

import math
import os
from pathlib import Path

import llama_cpp.llama_cpp as llama
import numpy as np

from pinaivu_box.models.gguf import TENSOR_TYPES
from tests.support import gguf_files
from tests.support.model_shapes import F16, F32, Shape

SPREAD = 0.05
_KINDS = {F32: np.float32, F16: np.float16}


def write(shape: Shape, folder: Path, seed: int = 1) -> Path:
    """The file.  All matrices of the shape have to be F16 or F32."""
    path = shape.write(folder)
    given = np.random.default_rng(seed)
    tensors = list(shape.tensors())
    sizes = [_aligned(math.prod(shape_) // TENSOR_TYPES[kind][0] * TENSOR_TYPES[kind][1])
             for _, shape_, kind in tensors]  # fmt: skip
    with path.open("r+b") as file:
        file.seek(path.stat().st_size - sum(sizes))
        for (_, dimensions, kind), size in zip(tensors, sizes, strict=True):
            count = math.prod(dimensions)
            values = given.standard_normal(count, np.float32) * np.float32(SPREAD)
            if len(dimensions) == 1:  # norms
                values += 1
            data = values.astype(_KINDS[kind]).tobytes()
            file.write(data + bytes(size - len(data)))
    return path


def quantised(source: Path, target: Path, file_type: int) -> Path:
    """Another file with the weights of `source` in that type (LLAMA_FTYPE_...)."""
    params = llama.llama_model_quantize_default_params()
    params.ftype, params.allow_requantize, params.nthread = file_type, True, 1
    if llama.llama_model_quantize(os.fsencode(source), os.fsencode(target), params):
        raise RuntimeError(f"llama.cpp cannot make {target.name}")
    return target


def _aligned(size: int) -> int:
    return -(-size // gguf_files.ALIGNMENT) * gguf_files.ALIGNMENT
