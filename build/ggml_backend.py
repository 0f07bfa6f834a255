"""Backends of ggml for GPUs: compiled from llama-cpp-python's own source, with the flags of the
build that they are for, and kept in the cache as libraries of their own.
"""

import os
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from common import CMAKE_ARGS, Stop, digest, source_key
from environment import clean_environment, locked, need_space, run_quietly, scratch
from llama import check_compiler, compiler, first_error, follow, source, tools, version
from progress import step

JOB_MB = 700  # of memory that one compiler takes at most
LIBRARY = "libggml-{name}.so"
STAND_INS = "stand-in"  # as in pinaivu_box.engine.libraries
# All of its functions fail; those that give a text say why.
STAND_IN = "int {function}(void) {{ return 1; }}\n"
STAND_IN_TEXT = 'const char *{function}(void) {{ return "the library is not installed"; }}\n'


@dataclass(frozen=True)
class Recipe:
    """How a backend is made.  `made_with` is the version of its tools, `minutes` what it takes of
    one core; `stand_ins` begin the names of libraries that may be absent (`make_stand_ins`)."""

    name: str  # of the target ggml-NAME
    flags: tuple[str, ...]
    made_with: str
    minutes: int
    environment: dict[str, str] = field(default_factory=dict)
    stand_ins: tuple[str, ...] = ()

    def folder(self, cache: Path) -> Path:
        """Its place in the cache, named by all that matters.  A backend fits a build of llama.cpp
        of the same source and flags; what the patch changes is no part of it."""
        return cache / f"ggml-{self.name}-{source_key()}-{digest(*self.flags, self.made_with)}"


def backend(cache: Path, recipe: Recipe) -> Path:
    """The folder with the backend, which is compiled first if it is not there.  After an
    interruption it goes on where it was."""
    folder = recipe.folder(cache)
    if folder.is_dir():
        return folder
    check_compiler()
    need_space(cache, 2000)
    work = cache / f"{folder.name}.build"
    work.mkdir(exist_ok=True)
    with locked(work):
        if not folder.is_dir():
            compile_backend(cache, recipe, work)
            pick_up(recipe, work, folder)
    shutil.rmtree(work, ignore_errors=True)
    return folder


def compile_backend(cache: Path, recipe: Recipe, work: Path) -> None:
    log = cache / f"ggml-{recipe.name}.log"
    with locked(cache):
        root, programs = kept_source(cache), tools(cache) / "bin"
    flags = [*CMAKE_ARGS.split(), *recipe.flags, "-DCMAKE_BUILD_TYPE=Release"]
    # Without an rpath of this machine; and the sdist's own script wants to know where to install.
    flags += ["-DCMAKE_BUILD_WITH_INSTALL_RPATH=ON", "-DCMAKE_INSTALL_RPATH=$ORIGIN"]
    flags += [f"-DSKBUILD_PLATLIB_DIR={work / 'unused'}"]
    folders = ["-S", str(root), "-B", str(work / "cmake")]
    cores = jobs()
    build = ["--build", str(work / "cmake"), "--target", f"ggml-{recipe.name}", "-j", str(cores)]
    path = os.pathsep.join([str(programs), recipe.environment.get("PATH", os.environ["PATH"])])
    environment = clean_environment() | recipe.environment
    environment |= {"PATH": path, "NINJA_STATUS": "[%f/%t] "}
    cmake = str(programs / "cmake")
    configuring = f"configuring the {recipe.name} backend"
    what = f"building the {recipe.name} backend ({duration(recipe.minutes / cores)}, once)"
    with log.open("w") as file:
        failed = follow(
            [cmake, *folders, "-G", "Ninja", *flags], environment, file, configuring, what
        ) or follow([cmake, *build], environment, file, what, what)
    if failed:
        message = f"the backend did not build (see above, or all of {log}): mend it and run again"
        raise Stop(message, shown=first_error(log))


def jobs() -> int:
    """As many as there are cores, if their memory is there."""
    cores = len(os.sched_getaffinity(0))
    free = re.search(r"^MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    return max(1, min(cores, int(free[1]) // 1024 // JOB_MB)) if free else 1


def duration(minutes: float) -> str:
    if minutes > 90:
        return f"about {minutes / 60:.1f} hours"
    return f"about {round(minutes)} minutes" if minutes > 1.5 else "about a minute"


def pick_up(recipe: Recipe, work: Path, folder: Path) -> None:
    done = work / "done"
    shutil.rmtree(done, ignore_errors=True)
    done.mkdir()
    name = LIBRARY.format(name=recipe.name)
    shutil.copy2(next((work / "cmake").rglob(name)), done / name)
    make_stand_ins(done, done / name, recipe.stand_ins)
    done.rename(folder)


def kept_source(cache: Path) -> Path:
    """llama-cpp-python's source, the same that its wheel is built from; call it with the cache
    locked."""
    folder = cache / f"llama-cpp-python-{version()}-source"
    if not folder.is_dir():
        need_space(cache, 1000)
        work = scratch(cache)
        source(cache, work).rename(folder)
        shutil.rmtree(work)
    return folder


def make_stand_ins(folder: Path, library: Path, names: tuple[str, ...]) -> None:
    """Libraries that have the functions which `library` takes of those whose names begin so, and no
    others; each returns an error.  Where the real ones are absent, these let it be loaded."""
    needed = read_elf("-d", library)
    for file in re.findall(r"\(NEEDED\).*\[(\S+)\]", needed):
        if file.startswith(names):
            stand_in(folder / STAND_INS, file, functions_of(library, file))


def functions_of(library: Path, needed: str) -> list[str]:
    """The functions that `library` takes of `needed`: their versions bear its name."""
    symbols = read_elf("--dyn-syms", library)
    return sorted(set(re.findall(rf" UND (\w+)@{re.escape(needed)}\b", symbols)))


def stand_in(folder: Path, name: str, functions: list[str]) -> None:
    folder.mkdir(exist_ok=True)
    code, versions = folder / "stand_in.c", folder / "versions"
    code.write_text("".join(map(failing, functions)))
    versions.write_text(f"{name} {{ global: *; }};\n")
    options = ["-shared", "-fPIC", "-nostdlib", f"-Wl,-soname,{name}"]
    options += [f"-Wl,--version-script={versions}", "-o", str(folder / name)]
    with step(f"making a stand-in for {name}"):
        run_quietly([compiler(), *options, str(code)], "making a library")
    code.unlink()
    versions.unlink()


def failing(function: str) -> str:
    form = STAND_IN_TEXT if function.endswith("String") else STAND_IN
    return form.format(function=function)


def read_elf(what: str, library: Path) -> str:
    command = ["readelf", "--wide", what, str(library)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
