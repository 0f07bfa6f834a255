"""Products of matrices in ggml's own functions: whether a row is the same in any number of rows."""

from __future__ import annotations

import ctypes
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

WIDTH, HEIGHT = 512, 256
ROWS = (1, 2, 3, 4, 5, 7, 8, 16, 17, 33, 63, 64, 192, 512)
TYPES = {  # ggml_type
    "f32": 0, "f16": 1, "bf16": 30, "q8_0": 8, "q4_0": 2, "q4_1": 3, "q5_0": 6, "q5_1": 7,
    "q2_K": 10, "q3_K": 11, "q4_K": 12, "q5_K": 13, "q6_K": 14, "iq4_nl": 20, "iq4_xs": 23,
    "mxfp4": 39,
}  # fmt: skip
_POINTER, _SIZE = ctypes.c_void_p, ctypes.c_size_t


class _Parameters(ctypes.Structure):
    """ggml_init_params"""

    _fields_ = (("mem_size", _SIZE), ("mem_buffer", _POINTER), ("no_alloc", ctypes.c_bool))


class Products:
    """One CPU variant.  Raises AssertionError if it does not run here."""

    def __init__(self, libraries: Path, variant: str) -> None:
        self._parts = [
            ctypes.CDLL(str(libraries / name), mode=ctypes.RTLD_GLOBAL)
            for name in ("libggml-base.so", "libggml.so")
        ]
        library = str(libraries / f"libggml-cpu-{variant}.so").encode()
        registry = self._call("ggml_backend_load", _POINTER, ctypes.c_char_p(library))
        assert registry
        device = self._call("ggml_backend_reg_dev_get", _POINTER, registry, _SIZE(0))
        self._device = _POINTER(device)
        self._backend = self._call("ggml_backend_dev_init", _POINTER, self._device, None)
        self._plain = self._call("ggml_backend_dev_buffer_type", _POINTER, self._device)
        threads = self._address(registry, b"ggml_backend_set_n_threads")
        self._set_threads = ctypes.CFUNCTYPE(None, _POINTER, ctypes.c_int)(threads)
        extra = self._address(registry, b"ggml_backend_dev_get_extra_bufts")
        listed = ctypes.CFUNCTYPE(ctypes.POINTER(_POINTER), _POINTER)(extra)(self._device)
        self._repacked = listed[0] if listed else None

    def _call(self, name: str, result: Any, *arguments: Any) -> Any:
        part = next(each for each in self._parts if hasattr(each, name))
        function = getattr(part, name)
        function.restype = result
        return function(*(_POINTER(a) if isinstance(a, int) else a for a in arguments))

    def _address(self, registry: int, name: bytes) -> int:
        call = "ggml_backend_reg_get_proc_address"
        return int(self._call(call, _POINTER, registry, ctypes.c_char_p(name)))

    def weights(self, kind: int) -> npt.NDArray[np.uint8]:
        values = np.random.default_rng(0).standard_normal((HEIGHT, WIDTH), np.float32)
        data = np.empty(values.nbytes, np.uint8)
        shape = [ctypes.c_int64(each) for each in (0, HEIGHT, WIDTH)]
        addresses = values.ctypes.data, data.ctypes.data
        self._call("ggml_quantize_chunk", _SIZE, ctypes.c_int(kind), *addresses, *shape, None)
        return data

    def _tensor(self, context: int, kind: int, *dimensions: int) -> int:
        sizes = (ctypes.c_int64 * len(dimensions))(*dimensions)
        count = ctypes.c_int(len(dimensions))
        made = self._call(
            "ggml_new_tensor", _POINTER, context, ctypes.c_int(kind), count, sizes
        )  # fmt: skip
        return int(made)

    def product(
        self,
        kind: int,
        data: npt.NDArray[np.uint8],
        rows: npt.NDArray[np.float32],
        threads: int,
        *,
        repacked: bool,
    ) -> npt.NDArray[np.float32] | None:
        """None if this type has no repacked form here."""
        fresh = [
            self._call("ggml_init", _POINTER, _Parameters(1 << 20, None, no_alloc=True))
            for _ in range(2)
        ]
        matrix = self._tensor(fresh[0], kind, WIDTH, HEIGHT)
        where = self._repacked if repacked else self._plain
        buffers = [
            self._call("ggml_backend_alloc_ctx_tensors_from_buft", _POINTER, fresh[0], where)
        ]
        given = self._tensor(fresh[1], 0, WIDTH, len(rows))
        made = self._call("ggml_mul_mat", _POINTER, fresh[1], matrix, given)
        graph = self._call("ggml_new_graph", _POINTER, fresh[1])
        self._call("ggml_build_forward_expand", None, graph, made)
        call = "ggml_backend_alloc_ctx_tensors_from_buft"
        buffers.append(self._call(call, _POINTER, fresh[1], self._plain))
        found = None
        if self._call("ggml_backend_dev_supports_op", ctypes.c_bool, self._device, made):
            size = self._call("ggml_nbytes", _SIZE, matrix)
            self._copy("set", matrix, data, size)
            self._copy("set", given, np.ascontiguousarray(rows), rows.nbytes)
            self._set_threads(self._backend, threads)
            computed = "ggml_backend_graph_compute"
            assert self._call(computed, ctypes.c_int, self._backend, graph) == 0
            found = np.empty((len(rows), HEIGHT), np.float32)
            self._copy("get", made, found, found.nbytes)
        for buffer in buffers:
            self._call("ggml_backend_buffer_free", None, buffer)
        for context in fresh:
            self._call("ggml_free", None, context)
        return found

    def _copy(self, way: str, tensor: int, data: npt.NDArray[Any], size: int) -> None:
        address = _POINTER(data.ctypes.data)
        name = f"ggml_backend_tensor_{way}"
        self._call(name, None, tensor, address, _SIZE(0), _SIZE(size))


def table(libraries: Path, variant: str) -> dict[str, str]:
    """For each type, plain and repacked: "" if a row is the same in any number of rows, or the
    numbers of rows in which it changes."""
    products = Products(libraries, variant)
    rows = np.random.default_rng(1).standard_normal((max(ROWS), WIDTH), np.float32)
    found = {}
    for name, kind in TYPES.items():
        data = products.weights(kind)
        for repacked in (False, True):
            # The last row, which is first where there is one: the others come before it.
            made = [
                (count, products.product(kind, data, rows[-count:], threads, repacked=repacked))
                for count in ROWS
                for threads in (1, 2)
            ]
            known = [(count, each[-1]) for count, each in made if each is not None]
            if known:
                changes = dict.fromkeys(
                    count
                    for (_, before), (count, now) in pairwise(known)
                    if not np.array_equal(before, now)
                )
                found[f"{name}{' repacked' * repacked}"] = ", ".join(map(str, changes))
    return found
