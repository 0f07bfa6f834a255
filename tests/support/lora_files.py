"""LoRA adapters for the bundled model, and that model with one of its matrices changed."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tests.support import gguf_files
from tests.support.gguf_files import Real

Matrix = npt.NDArray[np.float32]
_F32, _Q8_0, _FLOAT = 0, 8, 6
_BLOCK = np.dtype([("scale", "<f2"), ("values", "i1", 32)])
RANK = 4
ALPHA = 8.0
CHANGED = "blk.3.ffn_down.weight"


class LowRank(NamedTuple):
    """What an adapter adds to a matrix: `b @ a`."""

    a: Matrix
    b: Matrix


def low_rank(shape: tuple[int, int], seed: int = 1, size: float = 0.05) -> LowRank:
    """For a matrix with so many rows and columns."""
    rng = np.random.default_rng(seed)
    a = rng.normal(0, size, (RANK, shape[1])).astype(np.float32)
    return LowRank(a, rng.normal(0, size, (shape[0], RANK)).astype(np.float32))


def adapter(
    matrices: Mapping[str, LowRank],
    *,
    architecture: str = "llama",
    kind: str = "adapter",
    adapter_type: str = "lora",
    more: tuple[bytes, ...] = (),
) -> bytes:
    keys = [
        gguf_files.word("general.architecture", architecture),
        gguf_files.word("general.type", kind),
        gguf_files.word("adapter.type", adapter_type),
        gguf_files.key("adapter.lora.alpha", _FLOAT, struct.pack("<f", ALPHA)),
        *more,
    ]
    tensors = []
    for name, pair in matrices.items():
        tensors += [_tensor(f"{name}.lora_a", pair.a), _tensor(f"{name}.lora_b", pair.b)]
    return Real(keys, tensors).written(keys)


def whole_matrix(real: Real, name: str = CHANGED) -> Matrix:
    """A matrix of the model, in 32 bits."""
    entry, data = next(one for one in real.tensors if one[0].startswith(gguf_files.text(name)))
    columns, rows, kind = struct.unpack_from("<QQI", entry, 8 + len(name) + 4)
    assert kind == _Q8_0
    blocks = np.frombuffer(data, _BLOCK, rows * columns // 32)
    values = blocks["values"].astype(np.float32) * blocks["scale"].astype(np.float32)[:, None]
    return np.asarray(values.reshape(rows, columns))


def with_matrix(real: Real, matrix: Matrix, name: str = CHANGED) -> bytes:
    """The model's file with that matrix."""
    tensors = [
        _tensor(name, matrix) if entry.startswith(gguf_files.text(name)) else (entry, data)
        for entry, data in real.tensors
    ]
    return real.written(real.keys, tensors)


def merged(matrix: Matrix, pair: LowRank, scale: float) -> Matrix:
    return np.asarray(matrix + scale * ALPHA / RANK * (pair.b @ pair.a), np.float32)


def written(folder: Path, name: str, data: bytes) -> Path:
    path = folder / f"{name}.gguf"
    path.write_bytes(data)
    return path


def _tensor(name: str, values: Matrix) -> tuple[bytes, bytes]:
    rows, columns = values.shape
    entry = gguf_files.text(name) + struct.pack("<IQQI", 2, columns, rows, _F32)
    return entry, values.astype("<f4").tobytes()
