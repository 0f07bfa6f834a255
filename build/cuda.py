"""The CUDA backend: its toolkit, from the machine or from PyPI, and the GPUs it is made for."""

import os
import re
import shutil
import subprocess
from pathlib import Path

from common import BUILD, Stop, digest
from environment import locked, need_space, pip, run_quietly, scratch
from ggml_backend import Recipe, backend
from llama import compiler
from progress import step

LOCK = BUILD / "requirements-cuda.txt"
FLAGS = ("-DGGML_CUDA=ON", "-DGGML_CUDA_NCCL=OFF")
# What runs on every GPU from Turing on, and fast on those that most have.  Newer GPUs get code that
# the driver makes of the last PTX (`virtual`) when they see it first.
RELEASE = "75-virtual;80-virtual;86-real;89-real;90-virtual;120a-real;121a-real"
ANY = "75-virtual"
OLDEST = 75
ARCHITECTURE = re.compile(r"\d{2,3}[af]?(-real|-virtual)?")
# Minutes of one core, measured: what does not depend on the architecture, PTX, and machine code.
MINUTES_BASE, MINUTES_PTX, MINUTES_CODE = 20, 21, 46
CUBLAS = ("libcublas.so", "libcublasLt.so")
# What ggml-cuda takes of the driver's library, which a machine without a driver does not have.
DRIVER_FUNCTIONS = (
    "cuDeviceGet", "cuDeviceGetAttribute", "cuGetErrorString", "cuMemAddressFree",
    "cuMemAddressReserve", "cuMemCreate", "cuMemGetAllocationGranularity", "cuMemMap",
    "cuMemRelease", "cuMemSetAccess", "cuMemUnmap",
)  # fmt: skip


def made(cache: Path, wanted: str) -> tuple[Path, Path]:
    """The folder with the backend for these architectures ("" are those of the GPUs here), and the
    folder with cuBLAS."""
    chosen = architectures(wanted)
    root = on_this_machine() or from_pypi(cache)
    return backend(cache, recipe(root, chosen)), libraries(root)


def recipe(root: Path, chosen: str) -> Recipe:
    nvcc = root / "bin/nvcc"
    environment = {
        "CUDA_PATH": str(root),
        "CUDAToolkit_ROOT": str(root),
        "CUDACXX": str(nvcc),
        "PATH": f"{root / 'bin'}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
    }
    flags = (*FLAGS, f"-DCMAKE_CUDA_ARCHITECTURES={chosen}")
    return Recipe("cuda", flags, nvcc_version(nvcc), minutes(chosen), environment, CUBLAS)


def architectures(wanted: str) -> str:
    """CMake's list.  Raises Stop if it cannot be."""
    if wanted == "all":
        return RELEASE
    chosen = wanted.replace(",", ";") or of_gpus_here()
    for one in chosen.split(";"):
        if not ARCHITECTURE.fullmatch(one):
            raise Stop(f"{one!r} is no architecture: say --arch 86, --arch '80;86', or --arch all")
        if int(re.findall(r"\d+", one)[0]) < OLDEST:
            raise Stop(f"CUDA 13 knows no GPUs older than Turing (75), and {one} is one of them")
    return chosen


def of_gpus_here() -> str:
    """Those of this machine's GPUs; if there are none, what runs on any."""
    program = shutil.which("nvidia-smi")
    if not program:
        return ANY
    query = [program, "--query-gpu=compute_cap", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, check=False)
    found = sorted(set(re.findall(r"^(\d+)\.(\d)$", done.stdout, re.MULTILINE)))
    return ";".join(f"{major}{minor}-real" for major, minor in found) or ANY


def minutes(chosen: str) -> int:
    """Of one core."""
    each = [one.partition("-")[2] for one in chosen.split(";")]
    ptx = sum(kind in ("", "virtual") for kind in each)
    code = sum(kind in ("", "real") for kind in each)
    return MINUTES_BASE + MINUTES_PTX * ptx + MINUTES_CODE * code


# -- the toolkit ---------------------------------------------------------------------------------


def on_this_machine() -> Path | None:
    """A toolkit that has all that is needed: many have a compiler and no cuBLAS."""
    named = [os.environ.get(name) for name in ("CUDA_PATH", "CUDA_HOME")]
    nvcc = shutil.which("nvcc")
    beside = Path(nvcc).resolve().parent.parent if nvcc else None
    for root in filter(None, [*named, beside, "/usr/local/cuda", "/opt/cuda"]):
        if complete(Path(root)):
            return Path(root).resolve()
    return None


def complete(root: Path) -> bool:
    wanted = ("bin/nvcc", "include/cublas_v2.h", "lib64/libcublas.so")
    return all((root / path).exists() for path in wanted)


def libraries(root: Path) -> Path:
    return (root / "lib64").resolve()


def nvcc_version(nvcc: Path) -> str:
    done = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False)
    found = re.search(r"release \S+ (\S+)", done.stdout)
    if not found:
        raise Stop(f"{nvcc} does not run: {(done.stderr or done.stdout).strip()[:200]}")
    return found[1]


def from_pypi(cache: Path) -> Path:
    """NVIDIA's own wheels, made into a toolkit that CMake takes."""
    folder = cache / f"cuda-toolkit-{digest(LOCK.read_bytes())}"
    root = folder / "nvidia/cu13"
    with locked(cache):
        if not folder.is_dir():
            need_space(cache, 2500)
            work = scratch(cache)
            only = ["--require-hashes", "--no-deps", "--target", str(work / "all")]
            with step("fetching NVIDIA's CUDA toolkit, 530 MB (1-5 minutes, once)"):
                pip("install", *only, "-r", str(LOCK))
            mend(work / "all/nvidia/cu13", root)
            (work / "all").rename(folder)
            shutil.rmtree(work)
    return root


def mend(work: Path, root: Path) -> None:
    """What the wheels lack of a toolkit: names of libraries that a linker looks for.  `root` is
    where they will be."""
    lib = work / "lib"
    (work / "lib64").symlink_to("lib")
    for name in CUBLAS:
        (lib / name).symlink_to(next(lib.glob(f"{name}.*")).name)
    # The static one, so that nothing but cuBLAS is needed at run time.
    (lib / "libcudart.so").write_text(f"INPUT({root / 'lib/libcudart_static.a'})\n")
    (lib / "stubs").mkdir()
    code = "".join(f"int {function}(void) {{ return 1; }}\n" for function in DRIVER_FUNCTIONS)
    (lib / "stubs/cuda.c").write_text(code)
    link = [compiler(), "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1"]
    files = ["-o", str(lib / "stubs/libcuda.so"), str(lib / "stubs/cuda.c")]
    with step("making the toolkit complete"):
        run_quietly([*link, *files], "making a library to link with")
