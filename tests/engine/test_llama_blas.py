"""Without cuBLAS, CUDA devices get only models that never call it."""

from __future__ import annotations

import shutil
import struct
from pathlib import Path

import pytest
from msgspec.structs import replace

from pinaivu_box.engine.llama_blas import needs_blas
from pinaivu_box.engine.messages import Adapter, LoadModel
from tests.support import fake_gpu
from tests.support.backend_probe import probe
from tests.support.gguf_files import aligned, header, text

F32, F16, Q4_0, Q8_0, TQ1_0, BF16 = 0, 1, 2, 8, 34, 30
BYTES = {F32: 4 * 256, F16: 2 * 256, Q4_0: 18 * 8, Q8_0: 34 * 8, TQ1_0: 54, BF16: 2 * 256}
ROWS = 32  # so that every tensor ends where the next may begin
USUAL = {"token_embd.weight": F16, "output.weight": Q8_0, "blk.0.attn_q.weight": Q4_0}


def load(path: Path, tensors: dict[str, int], vectors: tuple[str, ...] = ()) -> LoadModel:
    """A file with these matrices and vectors."""
    described, offset = [], 0
    for name, kind in {**tensors, **dict.fromkeys(vectors, F32)}.items():
        rows = 1 if name in vectors else ROWS
        shape = struct.pack("<IQQ", 2, 256, rows)
        described.append(text(name) + shape + struct.pack("<IQ", kind, offset))
        offset += BYTES[kind] * rows
    path.write_bytes(aligned(header(tensors=described)) + bytes(offset))
    return LoadModel(str(path), 0, 256, 256, 1, 256, 1)


@pytest.mark.parametrize(
    ("tensors", "needs"),
    [
        ({}, False),
        ({"output.weight": F16}, True),
        ({"blk.0.ffn_down.weight": F32}, True),
        ({"blk.0.ffn_down.weight": BF16}, True),
        ({"blk.0.ffn_down.weight": TQ1_0}, True),
        ({"blk.0.ffn_gate_inp.weight": F32}, True),  # which expert a token goes to
        ({"blk.0.ssm_in.weight": Q8_0}, True),
    ],
)
def test_weights_say_whether_it_is_called(
    tmp_path: Path, tensors: dict[str, int], needs: bool
) -> None:
    made = load(tmp_path / "model.gguf", {**USUAL, **tensors}, ("blk.0.attn_norm.weight",))
    assert needs_blas(made) is needs


def test_rows_that_are_looked_up_count_if_they_are_the_output_as_well(tmp_path: Path) -> None:
    tied = {name: kind for name, kind in USUAL.items() if name != "output.weight"}
    assert needs_blas(load(tmp_path / "model.gguf", tied))
    assert not needs_blas(load(tmp_path / "model.gguf", {**tied, "token_embd.weight": Q8_0}))


def test_adapters_need_it(tmp_path: Path) -> None:
    made = load(tmp_path / "model.gguf", USUAL)
    adapted = replace(made, adapters=[Adapter(path="adapter.gguf")])
    assert not needs_blas(made) and needs_blas(adapted)


def test_what_is_no_model_needs_nothing(tmp_path: Path) -> None:
    made = load(tmp_path / "model.gguf", USUAL)
    Path(made.path).write_bytes(b"GGUF")
    assert not needs_blas(made)
    Path(made.path).unlink()
    assert not needs_blas(made)


@pytest.fixture
def without_cublas(tmp_path: Path) -> dict[str, str]:
    """An environment whose backend has but a stand-in for cuBLAS."""
    folder = tmp_path / "backend"
    (folder / "stand-in").mkdir(parents=True)
    backend = fake_gpu.backend_that_needs_cublas() / "libggml-cuda.so"
    shutil.copy2(backend, folder)
    shutil.copy2(fake_gpu.cublas(), folder / "stand-in")
    return {**fake_gpu.environment("CUDA0:1024"), "PINAIVU_BACKENDS": str(folder)}


def test_a_quantised_model_is_computed_on_the_gpu(without_cublas: dict[str, str]) -> None:
    found = probe(without_cublas, 256)
    assert found["device"].startswith("Fake GPU")
    assert found["backends"][0]["stand_ins"] == [fake_gpu.cublas().name]


def test_another_is_computed_on_the_cpu_and_that_is_said(
    without_cublas: dict[str, str], tmp_path: Path
) -> None:
    found = probe(without_cublas, 256, model=in_f16(tmp_path))
    assert "Fake GPU" not in found["device"] and len(found["tokens"]) == 8
    assert "cuBLAS, which is not installed" in found["stderr"]


def in_f16(folder: Path) -> Path:
    """The bundled model with its weights in F16."""
    import llama_cpp.llama_cpp as llama

    from pinaivu_box.models import bundled

    found = bundled.find()
    assert found
    params = llama.llama_model_quantize_default_params()
    params.ftype, params.allow_requantize = llama.LLAMA_FTYPE_MOSTLY_F16, True
    target = folder / "f16.gguf"
    assert llama.llama_model_quantize(bytes(found.path), bytes(target), params) == 0
    return target
