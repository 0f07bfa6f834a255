"""Loads a library together with those that it needs, wherever on this machine they are.

The loader looks for a needed library in its own cache and in LD_LIBRARY_PATH only.  cuBLAS may be
in a toolkit's folder or in a Python package, the driver in a folder of its distribution's: what the
loader does not find is looked for in those and loaded first.  The last resort is a folder
`stand-in` beside the library: what is there has the functions that are needed, and all of them
fail.
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

STAND_INS = "stand-in"
_NOT_FOUND = re.compile(r"(\S+): cannot open shared object file: No such file")
_MOST_NEEDED = 16  # libraries that one library lacks
_TOOLKITS = ("/usr/local/cuda", "/usr/local/cuda-*", "/opt/cuda")
_DRIVERS = (
    "/usr/lib/x86_64-linux-gnu/nvidia/current",  # Debian
    "/usr/lib/wsl/lib",  # Windows' own, inside its Linux
    "/run/opengl-driver/lib",  # NixOS
)
_PACKAGES = ("nvidia/cu13/lib", "nvidia/cublas/lib", "nvidia/cuda_runtime/lib")
_PYTHONS = ("lib/python3*/site-packages", "lib/python3*/dist-packages")


@dataclass(frozen=True)
class Loaded:
    """`problem` is "" if the library was loaded; `missing` is the library that could not be found,
    if that is the problem; `stand_ins` are those of `STAND_INS` that are loaded."""

    problem: str = ""
    missing: str = ""
    stand_ins: tuple[str, ...] = ()


def load(path: Path, places: Sequence[Path] = ()) -> Loaded:
    """Loads the library `path`, and before it what it needs and the loader does not find.  That is
    looked for beside it, in `places`, and where such libraries usually are."""
    places = [path.parent, *places]
    stand_ins: list[str] = []
    missing, problem = "", ""
    for _ in range(_MOST_NEEDED):
        problem = _try(path)
        found = _NOT_FOUND.match(problem)
        if not found or found[1] == missing:
            break
        missing = found[1]
        if _load_needed(missing, places):
            continue
        if _try(path.parent / STAND_INS / missing):
            break
        stand_ins.append(missing)
    return Loaded(problem, missing if problem else "", tuple(stand_ins))


def available(name: str) -> bool:
    """Whether a library of that name is on this machine."""
    return not _try(Path(name)) or _load_needed(name, ())


def _load_needed(name: str, places: Sequence[Path]) -> bool:
    return any(
        (place / name).is_file() and not load(place / name).problem
        for place in (*places, *_usual_places())
    )


def _try(path: Path) -> str:
    """The loader's complaint, "" if there is none."""
    try:
        ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        return str(error)
    return ""


def _usual_places() -> Iterator[Path]:
    chosen = filter(None, (os.environ.get(name) for name in ("CUDA_PATH", "CUDA_HOME")))
    for pattern in (*chosen, *_TOOLKITS):
        for toolkit in _matching(pattern):
            yield from (toolkit / "lib64", toolkit / "lib")
    yield from map(Path, _DRIVERS)
    for packages in _python_folders():
        for name in _PACKAGES:
            yield packages / name


def _python_folders() -> Iterator[Path]:
    """Where Python packages are: our own, and the machine's, which an executable does not have."""
    yield from map(Path, sys.path)
    prefixes = [os.environ.get("VIRTUAL_ENV", ""), str(Path("~/.local").expanduser())]
    for prefix in filter(None, [*prefixes, "/usr/local", "/usr"]):
        for pattern in _PYTHONS:
            yield from _matching(f"{prefix}/{pattern}")


def _matching(pattern: str) -> list[Path]:
    """Folders that the pattern, an absolute path, names; the last version first."""
    return sorted(Path("/").glob(pattern.lstrip("/")), reverse=True)
