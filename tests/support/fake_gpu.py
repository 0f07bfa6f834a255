"""Fake GPUs: a backend of ggml that computes on the CPU, and a library that stands in for NVML.

    env = fake_gpu.environment("CUDA0:512,CUDA1:256")      # for Box(home, env=env), pinaivu(...)
    env = fake_gpu.environment("CUDA0:512", nvml="RTX 3060:512:100", shared=tmp_path)

What the variables say in detail is in `fake_gpu_source/ggml_fake.cpp`, `fake_nvml.c` and
`fake_gpu_memory.h` beside this file.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import pytest

from tests.support.paths import ROOT

_SOURCE = Path(__file__).parent / "fake_gpu_source"


def environment(
    gpus: str = "", *, nvml: str | None = None, fail: str = "", shared: Path | None = None
) -> dict[str, str]:
    """The variables for a process with these GPUs.  `gpus` is "NAME:MIB,...", `fail` is
    "NAME:HOW:AFTER,..." with fail, memory or abort as HOW.  `nvml` is "NAME:MIB:MIB IN USE,..." or
    "error:CODE"; with "" the library finds no driver, and with None there is no library.  In the
    folder `shared` processes count the memory of all, and a test may write the files `others`
    (`GPU MIB [PID]` in lines) and `fail` at any time."""
    found = {"PINAIVU_BACKENDS": str(backend())}
    found |= {"FAKE_GPUS": gpus} if gpus else {}
    if nvml is not None:
        found["LD_LIBRARY_PATH"] = _library_path()
        found |= {"FAKE_NVML": nvml} if nvml else {}
    found |= {"FAKE_GPU_FAIL": fail} if fail else {}
    return found | ({"FAKE_GPU_DIR": str(shared)} if shared else {})


@cache
def backend() -> Path:
    """A folder with the backend, `libggml-cuda.so`.  Skips the test where it cannot be compiled."""
    return _backend()


@cache
def cublas() -> Path:
    """A library with the name of cuBLAS, of a version that nobody has."""
    name = "libcublas.so.999"
    return _compiled(compiler("cc", "gcc", "clang"), "fake_cublas.c", name, []) / name


@cache
def backend_that_needs_cublas() -> Path:
    """As `backend`, but it needs `cublas`."""
    return _backend("-Wl,--no-as-needed", str(cublas()))


def _backend(*more: str) -> Path:
    package = _llama_libraries()
    links = [f"-L{package}", "-lggml", "-lggml-base", f"-Wl,-rpath-link,{package}"]
    includes = [f"-I{folder}" for folder in _include_folders()]
    command = [*compiler("c++", "g++", "clang++"), "-std=c++17", *includes]
    return _compiled(command, "ggml_fake.cpp", "libggml-cuda.so", [*links, *more])


@cache
def nvml_library() -> Path:
    """A folder with `libnvidia-ml.so.1`, for LD_LIBRARY_PATH."""
    command = compiler("cc", "gcc", "clang")
    return _compiled(command, "fake_nvml.c", "libnvidia-ml.so.1", [])


def compiled_backends(name: str) -> list[Path]:
    """Folders of the build's cache with a real backend, made for this build of llama.cpp."""
    folders = _build_cache().glob(f"ggml-{name}-{_llama_key()}-*")
    return sorted(folder for folder in folders if not folder.name.endswith(".build"))


def _llama_key() -> str:
    """What the build calls this build of llama.cpp."""
    spec = importlib.util.spec_from_file_location("build_common", ROOT / "build/common.py")
    assert spec and spec.loader
    common = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(common)
    return str(common.llama_key())


def _library_path() -> str:
    return os.pathsep.join(
        filter(None, [str(nvml_library()), os.environ.get("LD_LIBRARY_PATH", "")])
    )


def _compiled(command: list[str], source: str, library: str, links: list[str]) -> Path:
    """The folder with the library; several processes may ask for it at the same time."""
    parts = [path.read_bytes() for path in sorted(_SOURCE.iterdir())]
    key = hashlib.sha256(b"\0".join([*parts, repr((command, links)).encode()])).hexdigest()[:16]
    cache = _cache()
    cache.mkdir(parents=True, exist_ok=True)
    folder = cache / f"{Path(library).name.partition('.')[0]}-{key}"
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.is_dir():
            return folder
        work = cache / "new"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        options = ["-shared", "-fPIC", "-O1", f"-Wl,-soname,{library}"]
        files = [str(_SOURCE / source), "-o", str(work / library)]
        done = subprocess.run(
            [*command, *options, *files, *links], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        work.rename(folder)
    return folder


def _cache() -> Path:
    return _build_cache() / "fake-gpu"


def _build_cache() -> Path:
    """Where the build keeps what it has compiled, or a folder for the time being."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())
    folder = Path(os.environ.get("PINAIVU_BUILD_CACHE") or home / "pinaivu-build")
    return folder if folder.is_dir() else Path(tempfile.gettempdir()) / f"pinaivu-{os.getuid()}"


def compiler(*names: str) -> list[str]:
    found = next(filter(None, map(shutil.which, names)), None)
    if not found:
        pytest.skip("there is no compiler for the fake GPU")
    return [found]


def _llama_libraries() -> Path:
    spec = importlib.util.find_spec("llama_cpp")
    assert spec and spec.origin
    return Path(spec.origin).parent / "lib"


def _include_folders() -> list[Path]:
    folders = list(_build_cache().glob(f"llama-cpp-python-*-{_llama_key()}/include"))
    if not folders:
        pytest.skip("llama.cpp's headers are not in the build's cache: build/test puts them there")
    return folders
