"""Puts into the executable what says in a sentence that a system's glibc is too old.

PyInstaller's loader itself starts wherever glibc is 2.14 or newer, and opens libpython.  It gets
another library under that name (glibc_check.c), which opens the real one if the system is new
enough.
"""

import ctypes
import re
import subprocess
from pathlib import Path

FOLDER = "python"  # of the real libpython, in the executable
LOADERS_NAMES = re.compile(rb"Py[A-Za-z]*_[A-Za-z0-9]+(?=\0)")
SOURCES = [Path(__file__).with_name(name) for name in ("glibc_check.c", "newer_functions.c")]
# What runs in every process takes nothing of another library by version.
FLAGS = ["-shared", "-fPIC", "-O2", "-nostdlib", "-fno-stack-protector", "-fno-builtin"]


def functions(loader: bytes) -> list[str]:
    """What the loader calls of this Python."""
    named = {name.decode() for name in LOADERS_NAMES.findall(loader)}
    return sorted(name for name in named if hasattr(ctypes.pythonapi, name))


def make(
    target: Path, compiler: str, python: str, needed: tuple[int, int], names: list[str]
) -> None:
    """Compile the library that opens `python`, a path from its own folder on, and has the functions
    `names` of it, if glibc is `needed` or newer."""
    listed = " ".join(f'F({number}, "{name}")' for number, name in enumerate(names))
    version = ".".join(map(str, needed))
    options = [
        f"-DFUNCTIONS(F)={listed}",
        f'-DPYTHON="{python}"',
        f'-DNEEDED="{version}"',
        f"-DNEEDED_MAJOR={needed[0]}",
        f"-DNEEDED_MINOR={needed[1]}",
    ]
    command = [*compiler.split(), *FLAGS, *options, "-o", str(target), *map(str, SOURCES)]
    subprocess.run(command, check=True)
