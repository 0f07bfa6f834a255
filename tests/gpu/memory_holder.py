"""Holds nearly all memory of the first GPU until its standard input ends, as another program would.

python -m tests.gpu.memory_holder MIB_LEFT
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import llama_cpp.llama_cpp as llama

from pinaivu_box.engine import backends

GPU = 1  # ggml_backend_dev_type


def main(left: int) -> None:
    ggml = llama._lib
    backends.load(ggml, Path(llama.__file__).parent / "lib")
    declare(ggml)
    device = ggml.ggml_backend_dev_by_type(GPU)
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    ggml.ggml_backend_dev_memory(device, ctypes.byref(free), ctypes.byref(total))
    kind = ggml.ggml_backend_dev_buffer_type(device)
    wanted = max(0, free.value - (left << 20))
    held = ggml.ggml_backend_buft_alloc_buffer(kind, wanted)
    print(f"{wanted >> 20 if held else 0} of {total.value >> 20} MiB", flush=True)
    sys.stdin.read()


def declare(ggml: ctypes.CDLL) -> None:
    ggml.ggml_backend_dev_by_type.restype = ctypes.c_void_p
    ggml.ggml_backend_dev_memory.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
    ggml.ggml_backend_dev_buffer_type.argtypes = (ctypes.c_void_p,)
    ggml.ggml_backend_dev_buffer_type.restype = ctypes.c_void_p
    ggml.ggml_backend_buft_alloc_buffer.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    ggml.ggml_backend_buft_alloc_buffer.restype = ctypes.c_void_p


if __name__ == "__main__":
    main(int(sys.argv[1]))
