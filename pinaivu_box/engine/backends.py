"""The backends of ggml in this process: the CPU's, and those for other devices that are found.

A backend is a library `libggml-NAME.so`.  Three kinds of folders are looked at, in this order, and
of a name the first that loads counts:

1. the `lib` folder of the package llama_cpp, with the CPU's variants, of which ggml takes the best
   that the processor has, unless another one is chosen;
2. what came with the program: `share/pinaivu/backends/NAME` beside the package, or the payloads of
   the executable (`payload`);
3. in place of these, the folders that PINAIVU_BACKENDS names if it is set.

Libraries that a backend needs are found in places where the loader does not look (`libraries`).  A
backend that cannot be loaded is stepped over, and `BackendLibrary.problem` says why.
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from pinaivu_box.engine import libraries, payload, unpacked
from pinaivu_box.errors import BoxError

VARIABLE = "PINAIVU_BACKENDS"
_PREFIX, _SUFFIX = "libggml-", ".so"
_CPU_PREFIX = f"{_PREFIX}cpu-"
_MAPPED = re.compile(r"/\S+\.so(?=\n)", re.ASCII)
_FIXED_SPLIT = "ggml_cpu_fixed_split"  # a function of the library that has it (see `build/`)
_DRIVER = "libcuda.so.1"
_NO_DEVICES = ("base", "cpu")  # what the names of libraries begin with that are no such backends


@dataclass(frozen=True)
class BackendLibrary:
    """A backend for other devices than the CPU.  `problem` is why it was not loaded, "" if it was;
    `missing` the library that was not found, if that is why; `stand_ins` the libraries that only
    look like those that it needs (see `libraries`)."""

    name: str  # cuda, vulkan, ...
    path: Path
    devices: int = 0
    problem: str = ""
    missing: str = ""
    stand_ins: tuple[str, ...] = ()


@dataclass(frozen=True)
class CpuLibrary:
    """ggml's library for the CPU: its `variant`, such as "haswell", and its `fixed_split` (see
    `exactness`), 0 if it is as its makers have published it."""

    variant: str = ""
    fixed_split: int = 0


_loaded: dict[Path, tuple[BackendLibrary, ...]] = {}


def load(ggml: ctypes.CDLL, package: Path, cpu_variant: str = "") -> tuple[BackendLibrary, ...]:
    """Loads the CPU's backend and all others that are found.  `ggml` is a library that has ggml's
    functions, `package` the folder that it is in.  Returns the others, also those that could not be
    loaded.  What was loaded stays for the life of the process: later calls, of any variant, return
    the same.  Raises BoxError if the processor cannot compute by the `cpu_variant`."""
    if package not in _loaded:
        _loaded[package] = _load(ggml, package, cpu_variant)
    return _loaded[package]


def _load(ggml: ctypes.CDLL, package: Path, cpu_variant: str) -> tuple[BackendLibrary, ...]:
    _declare(ggml)
    chosen = _chosen()
    payloads, broken = _payloads() if chosen is None else ([], [])
    places = [package, *([*_installed(), *payloads] if chosen is None else chosen)]
    paths = [path for place in places for path in _in_folder(place)]
    ready = {path: libraries.load(path, payloads) for path in paths}
    if cpu_variant:
        _load_variant(ggml, package, cpu_variant)
    else:
        ggml.ggml_backend_load_all_from_path(os.fsencode(package))
    found = {backend.name: backend for backend in broken}
    for path, loaded in ready.items():
        name = path.name.removeprefix(_PREFIX).removesuffix(_SUFFIX)
        if name not in found or found[name].problem:
            found[name] = _load_one(ggml, name, path, loaded)
    return tuple(found.values())


def variants(package: Path) -> list[str]:
    """The variants for the CPU that there are, whatever the processor has."""
    return sorted(filter(None, map(_variant_of, package.glob(f"{_CPU_PREFIX}*{_SUFFIX}"))))


def cpu_library(package: Path) -> CpuLibrary:
    """The one that this process has loaded."""
    paths = [Path(found[0]) for found in _MAPPED.finditer(Path("/proc/self/maps").read_text())]
    path = next((path for path in paths if path.name.startswith(_CPU_PREFIX[:-1])), None)
    if path is None:
        return CpuLibrary()
    split = getattr(ctypes.CDLL(str(path)), _FIXED_SPLIT, None)
    return CpuLibrary(_variant_of(path), 0 if split is None else split())


def _variant_of(path: Path) -> str:
    return path.name.removesuffix(_SUFFIX).removeprefix(_CPU_PREFIX)


def _load_variant(ggml: ctypes.CDLL, package: Path, variant: str) -> None:
    path = package / f"{_CPU_PREFIX}{variant}{_SUFFIX}"
    known = variants(package)
    if variant not in known:
        raise BoxError(
            f"there is no cpu_variant {variant} here: there are {', '.join(known) or 'none'}"
        )
    if not ggml.ggml_backend_load(os.fsencode(path)):
        raise BoxError(
            f"this processor cannot compute by the cpu_variant {variant}: choose another"
        )


def _chosen() -> list[Path] | None:
    """The folders that PINAIVU_BACKENDS names, None if it is not set."""
    chosen = os.environ.get(VARIABLE)
    return None if chosen is None else [Path(part) for part in chosen.split(os.pathsep) if part]


def _installed() -> list[Path]:
    return sorted((Path(sys.prefix) / "share" / "pinaivu" / "backends").glob("*/"))


def _payloads() -> tuple[list[Path], list[BackendLibrary]]:
    """The folders of this program's payloads, and those that could not be unpacked."""
    folders: list[Path] = []
    broken: list[BackendLibrary] = []
    try:
        payloads = payload.of_this_program()
    except payload.PayloadError as error:
        return [], [BackendLibrary("payload", Path(sys.executable), problem=str(error))]
    for one in payloads:
        # Beside an executable there may be libraries for NVIDIA's GPUs, of half a gigabyte.
        if one.beside and not libraries.available(_DRIVER):
            continue
        try:
            folders.append(unpacked.unpack(one, unpacked.cache_folder()))
        except payload.PayloadError as error:
            broken.append(BackendLibrary(one.table.name, one.path, problem=str(error)))
    return folders, broken


def _in_folder(place: Path) -> list[Path]:
    """The backends in a folder that are for other devices than the CPU."""
    return [
        path
        for path in sorted(place.glob(f"{_PREFIX}*{_SUFFIX}"))
        if not path.name.removeprefix(_PREFIX).startswith(_NO_DEVICES)
    ]


def _load_one(ggml: ctypes.CDLL, name: str, path: Path, loaded: libraries.Loaded) -> BackendLibrary:
    if loaded.problem:
        return BackendLibrary(name, path, problem=loaded.problem, missing=loaded.missing)
    registry = ggml.ggml_backend_load(os.fsencode(path))
    problem = "" if registry else "it is not for this version of llama.cpp"
    count = ggml.ggml_backend_reg_dev_count(registry) if registry else 0
    return BackendLibrary(name, path, count, problem, stand_ins=loaded.stand_ins)


def _declare(ggml: ctypes.CDLL) -> None:
    ggml.ggml_backend_load.argtypes = (ctypes.c_char_p,)
    ggml.ggml_backend_load.restype = ctypes.c_void_p
    ggml.ggml_backend_load_all_from_path.argtypes = (ctypes.c_char_p,)
    ggml.ggml_backend_load_all_from_path.restype = None
    ggml.ggml_backend_reg_dev_count.argtypes = (ctypes.c_void_p,)
    ggml.ggml_backend_reg_dev_count.restype = ctypes.c_size_t
