"""Backends of ggml: which are found, what they need, and what happens if they cannot be used."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.support import fake_gpu
from tests.support.backend_probe import TOKENS, probe

CONTEXT = 256


@pytest.fixture(scope="module")
def on_the_cpu() -> list[int]:
    return list(probe({}, CONTEXT)["tokens"])


def test_without_further_backends_there_are_none() -> None:
    found = probe({"PINAIVU_BACKENDS": ""})
    assert (found["code"], found["backends"]) == (0, [])


def test_fake_gpus_compute_what_the_cpu_does(on_the_cpu: list[int]) -> None:
    found = probe(fake_gpu.environment("CUDA0:512,CUDA1:512"), CONTEXT)
    assert found["tokens"] == on_the_cpu and len(on_the_cpu) == TOKENS
    assert [(one["name"], one["devices"]) for one in found["backends"]] == [("cuda", 2)]


def test_a_backend_without_devices_steps_aside(on_the_cpu: list[int]) -> None:
    found = probe(fake_gpu.environment(), CONTEXT)
    assert found["tokens"] == on_the_cpu
    assert [(one["devices"], one["problem"]) for one in found["backends"]] == [(0, "")]


@pytest.mark.parametrize(
    ("visible", "devices"), [("1", 1), ("1,0", 2), ("", 0), ("7", 0), ("GPU-fake-1,9,0", 1)]
)
def test_cuda_visible_devices_counts(visible: str, devices: int) -> None:
    gpus = fake_gpu.environment("CUDA0:64,CUDA1:512")
    found = probe({**gpus, "CUDA_VISIBLE_DEVICES": visible})
    assert [one["devices"] for one in found["backends"]] == [devices]


@pytest.mark.parametrize(
    ("gpus", "context", "error"),
    [("CUDA0:16", CONTEXT, "cannot load"), ("CUDA0:145", 8192, "cannot make a context")],
)
def test_no_memory_for_weights_or_context_is_an_error(gpus: str, context: int, error: str) -> None:
    found = probe(fake_gpu.environment(gpus), context)
    assert error in found["error"]
    assert "out of memory" in found["stderr"]


@pytest.mark.parametrize("how", ["fail", "memory"])
def test_a_step_that_a_device_refuses_is_an_error(how: str) -> None:
    found = probe(fake_gpu.environment("CUDA0:512", fail=f"CUDA0:{how}:3"), CONTEXT)
    assert "llama_decode failed" in found["error"]


def test_an_abort_in_a_step_ends_the_process() -> None:
    found = probe(fake_gpu.environment("CUDA0:512", fail="CUDA0:abort:3"), CONTEXT)
    assert found["code"] < 0


def test_processes_share_the_memory_of_a_gpu(tmp_path: Path) -> None:
    gpus = fake_gpu.environment("CUDA0:512", shared=tmp_path)
    assert "tokens" in probe(gpus, CONTEXT)
    (tmp_path / "others").write_text("0 400 1\n")
    assert "cannot load" in probe(gpus, CONTEXT)["error"]


# -- what cannot be loaded -----------------------------------------------------------------------


def test_what_is_no_library_is_stepped_over_with_the_reason(
    tmp_path: Path, on_the_cpu: list[int]
) -> None:
    (tmp_path / "libggml-other.so").write_bytes(b"\x7fELF and nothing else")
    found = probe({"PINAIVU_BACKENDS": str(tmp_path)}, CONTEXT)
    assert found["tokens"] == on_the_cpu
    (backend,) = found["backends"]
    assert backend["name"] == "other" and "file too short" in backend["problem"]


def test_a_backend_of_another_version_is_stepped_over(tmp_path: Path) -> None:
    code = "static int version = 999; void *ggml_backend_init(void) { return &version; }"
    library(tmp_path / "libggml-other.so", code)
    (backend,) = probe({"PINAIVU_BACKENDS": str(tmp_path)})["backends"]
    assert backend["problem"] == "it is not for this version of llama.cpp"


def test_the_first_that_loads_of_a_name_counts(tmp_path: Path) -> None:
    (tmp_path / "libggml-cuda.so").write_bytes(b"")
    gpus = fake_gpu.environment("CUDA0:512")
    both = f"{tmp_path}:{gpus['PINAIVU_BACKENDS']}"
    (backend,) = probe({**gpus, "PINAIVU_BACKENDS": both})["backends"]
    assert (backend["devices"], backend["problem"]) == (1, "")


# -- CUDA's own, if it was ever compiled here ----------------------------------------------------


@pytest.fixture(scope="module")
def compiled() -> Path:
    """A folder with the real backend for this build of llama.cpp.  Nothing compiles it here."""
    folders = fake_gpu.compiled_backends("cuda")
    if not folders:
        pytest.skip("CUDA's backend is not in the build's cache: the fake one is tested instead")
    return folders[0]


def test_the_compiled_backend_is_stepped_over_without_a_driver(
    compiled: Path, on_the_cpu: list[int]
) -> None:
    found = probe({"PINAIVU_BACKENDS": str(compiled)}, CONTEXT)
    (backend,) = found["backends"]
    assert found["tokens"] == on_the_cpu
    assert backend["devices"] == 0
    assert backend["missing"] in ("libcuda.so.1", "")  # the second: there is a driver and no GPU


def test_the_compiled_backend_is_loaded_with_a_driver_that_has_no_gpu(
    compiled: Path, tmp_path: Path, on_the_cpu: list[int]
) -> None:
    """The driver's functions all fail here, as those of one that is too old."""
    functions = subprocess.run(
        ["nm", "-D", "--undefined-only", compiled / "libggml-cuda.so"],
        capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    names = [name for name in functions if re.fullmatch(r"cu[A-Z]\w+", name)]
    code = "".join(f"int {name}(void) {{ return 100; }}\n" for name in names)
    library(tmp_path / "libcuda.so.1", code)
    env = {"PINAIVU_BACKENDS": str(compiled), "LD_LIBRARY_PATH": str(tmp_path)}
    found = probe(env, CONTEXT)
    (backend,) = found["backends"]
    assert found["tokens"] == on_the_cpu
    assert (backend["devices"], backend["problem"]) == (0, "")


# -- the libraries that one needs ----------------------------------------------------------------


@pytest.fixture
def needing(tmp_path: Path) -> Path:
    """A folder with a backend that needs a libcublas of a version that nobody has."""
    needed = library(
        tmp_path / "linked/libcublas.so.999", "int cublasCreate_v2(void) { return 0; }"
    )
    code = """
    int cublasCreate_v2(void);
    static int version = 999;
    void *ggml_backend_init(void) { version = cublasCreate_v2() ? 998 : 999; return &version; }
    """
    library(tmp_path / "backends/libggml-cuda.so", code, str(needed))
    return tmp_path / "backends"


def load_needing(folder: Path, **env: str) -> dict[str, Any]:
    (backend,) = probe({"PINAIVU_BACKENDS": str(folder), **env})["backends"]
    return dict(backend)


def test_a_library_that_is_nowhere_is_named(needing: Path) -> None:
    backend = load_needing(needing)
    assert backend["missing"] == "libcublas.so.999"
    assert "cannot open shared object file" in backend["problem"]


def test_a_needed_library_is_found_beside_in_a_toolkit_or_in_a_python_package(
    needing: Path, tmp_path: Path
) -> None:
    needed = tmp_path / "linked/libcublas.so.999"
    packages = tmp_path / "venv/lib/python3.12/site-packages/nvidia/cu13/lib"
    for folder, env in [
        (tmp_path / "toolkit/lib64", {"CUDA_PATH": str(tmp_path / "toolkit")}),
        (packages, {"VIRTUAL_ENV": str(tmp_path / "venv")}),
        (needing, {}),
    ]:
        assert load_needing(needing, **env)["missing"]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / needed.name).write_bytes(needed.read_bytes())
        backend = load_needing(needing, **env)
        assert (backend["missing"], backend["stand_ins"]) == ("", [])
        assert "version of llama.cpp" in backend["problem"]  # so its own code has run
        (folder / needed.name).unlink()


def test_a_stand_in_is_the_last_resort_and_is_named(needing: Path, tmp_path: Path) -> None:
    stand_in = needing / "stand-in/libcublas.so.999"
    stand_in.parent.mkdir()
    stand_in.write_bytes((tmp_path / "linked/libcublas.so.999").read_bytes())
    backend = load_needing(needing)
    assert (backend["missing"], backend["stand_ins"]) == ("", [stand_in.name])
    (needing / stand_in.name).write_bytes(stand_in.read_bytes())
    assert load_needing(needing)["stand_ins"] == []


def library(path: Path, code: str, *links: str) -> Path:
    """Compiles a library of a few functions."""
    path.parent.mkdir(parents=True, exist_ok=True)
    command = [*fake_gpu.compiler("cc", "gcc", "clang"), "-shared", "-fPIC", "-x", "c", "-"]
    options = [f"-Wl,-soname,{path.name}", "-o", str(path), "-x", "none", *links]
    subprocess.run([*command, *options], input=code, text=True, check=True)
    return path
