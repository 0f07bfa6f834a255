"""Which models a CUDA backend can compute without cuBLAS.

A stand-in for cuBLAS lets the backend be loaded where that library is absent; a call of it ends the
process.  CUDA's own kernels multiply by weights that are quantised in the usual ways; all others
go through cuBLAS as soon as a prompt is longer than a few tokens, and so do recurrent layers and
adapters.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator, Sequence

import llama_cpp.llama_cpp as llama

from pinaivu_box.engine.backends import BackendLibrary
from pinaivu_box.engine.messages import LoadModel

# As ggml_cuda_should_use_mmq has it.
_WITHOUT = frozenset((
    "q1_0", "q2_0", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_K", "q3_K", "q4_K", "q5_K", "q6_K",
    "iq1_s", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s", "iq4_xs", "iq4_nl", "mxfp4", "nvfp4",
))  # fmt: skip
_RECURRENT = ("ssm_", "time_mix_", "shortconv")  # in names of tensors
_LOOKED_UP = ("token_embd.", "position_embd.", "token_types.")  # rows are copied, not multiplied
_OUTPUT = "output.weight"  # without it the rows of token_embd are the output's matrix


class _Parameters(ctypes.Structure):
    """gguf_init_params"""

    _fields_ = (("no_alloc", ctypes.c_bool), ("context", ctypes.c_void_p))


def has_stand_in(backends: Sequence[BackendLibrary]) -> bool:
    """Whether cuBLAS is a stand-in here."""
    return any("blas" in name for backend in backends for name in backend.stand_ins)


def is_cuda(device: str) -> bool:
    return device.startswith("CUDA")


def allowed(load: LoadModel, gpus: list[str]) -> list[str]:
    """Those of `gpus` that can compute the model without cuBLAS; says so if some cannot."""
    left = [name for name in gpus if not is_cuda(name)]
    if left == gpus or not needs_blas(load):
        return gpus
    sys.stderr.write(
        f"{load.model or load.path} is not computed on CUDA devices: its weights or adapters take "
        "cuBLAS, which is not installed: pip install nvidia-cublas, or put "
        "pinaivu-cublas.payload beside the executable\n"
    )
    return left


def needs_blas(load: LoadModel) -> bool:
    """Whether computing this model on a GPU may call cuBLAS."""
    if load.adapters:
        return True
    tensors = [tensor for path in load.parts or [load.path] for tensor in _tensors(path, load)]
    tied = not any(name == _OUTPUT for name, _, _ in tensors)
    return any(
        any(part in name for part in _RECURRENT)
        or (matrix and kind not in _WITHOUT and (tied or not name.startswith(_LOOKED_UP)))
        for name, kind, matrix in tensors
    )


def _tensors(path: str, load: LoadModel) -> Iterator[tuple[str, str, bool]]:
    """Name, type, and whether it is a matrix, of each tensor of a file."""
    lib = llama._lib
    _declare(lib)
    libc = ctypes.CDLL(None)
    libc.fopen.restype = ctypes.c_void_p
    libc.fseeko.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int)
    libc.fclose.argtypes = (ctypes.c_void_p,)
    file = libc.fopen(os.fsencode(path), b"rb")
    if not file:
        return  # loading will say why
    try:
        libc.fseeko(file, load.offset, os.SEEK_SET)
        header = lib.gguf_init_from_file_ptr(file, _Parameters(True, None))
    finally:
        libc.fclose(file)
    if not header:
        return
    for number in range(lib.gguf_get_n_tensors(header)):
        name = lib.gguf_get_tensor_name(header, number).decode(errors="replace")
        kind = lib.ggml_type_name(lib.gguf_get_tensor_type(header, number)).decode()
        yield name, kind, lib.gguf_get_tensor_ne(header, number)[1] > 1
    lib.gguf_free(header)


def _declare(lib: ctypes.CDLL) -> None:
    lib.gguf_init_from_file_ptr.argtypes = (ctypes.c_void_p, _Parameters)
    lib.gguf_init_from_file_ptr.restype = ctypes.c_void_p
    lib.gguf_free.argtypes = (ctypes.c_void_p,)
    lib.gguf_get_n_tensors.argtypes = (ctypes.c_void_p,)
    lib.gguf_get_n_tensors.restype = ctypes.c_int64
    for name, result in [
        ("gguf_get_tensor_name", ctypes.c_char_p),
        ("gguf_get_tensor_type", ctypes.c_int),
        ("gguf_get_tensor_ne", ctypes.POINTER(ctypes.c_int64)),
    ]:
        getattr(lib, name).argtypes = (ctypes.c_void_p, ctypes.c_int64)
        getattr(lib, name).restype = result
    lib.ggml_type_name.argtypes = (ctypes.c_int,)
    lib.ggml_type_name.restype = ctypes.c_char_p
