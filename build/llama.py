"""The llama-cpp-python wheel: its source with our patch, compiled once and kept in the cache."""

import base64
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import TextIO

from common import (
    BUILD,
    CMAKE_ARGS,
    LEFT_OUT,
    LLAMA_LOCK,
    LLAMA_PATCH,
    Stop,
    digest,
    llama_key,
)
from environment import clean_environment, locked, need_space, run_quietly, scratch
from patching import apply
from progress import step

NINJA_STEP = re.compile(r"\s*\[(\d+)/(\d+)\] ")
EARLIEST = (1980, 1, 1, 0, 0, 0)  # that a zip file knows
BUILD_ERROR = re.compile(r"\bFAILED: |CMake Error|^ERROR: ")


def wheel(cache: Path) -> Path:
    """The wheel's path in the cache; builds it first if it is not there."""
    folder = cache / f"llama-cpp-python-{version()}-{llama_key()}"
    with locked(cache):
        if not folder.exists():
            check_compiler()
            need_space(cache, 1500)
            programs = tools(cache)
            work = scratch(cache)
            root = source(cache, work)
            with step("patching it"):
                apply(LLAMA_PATCH, root / "vendor/llama.cpp")
            made = compile_wheel(work, root, programs, cache / "llama-cpp-python.log")
            with step("packing it"):
                slim(made, work / "done")
            (work / "done").rename(folder)
            shutil.rmtree(work)
    return next(folder.glob("*.whl"))


def version() -> str:
    """Of llama-cpp-python."""
    return LLAMA_LOCK.read_text().partition("==")[2].split()[0]


def check_compiler() -> None:
    compiler("CC", "C", "cc", "gcc", "clang")
    compiler("CXX", "C++", "c++", "g++", "clang++")


def compiler(variable: str = "CC", language: str = "C", *names: str) -> str:
    for name in filter(None, [os.environ.get(variable), *(names or ("cc", "gcc", "clang"))]):
        if shutil.which(name.split()[0]):
            return name
    raise Stop(
        f"a {language} compiler is needed to build llama.cpp: install one"
        " (Debian, Ubuntu: apt install g++)"
    )


def tools(cache: Path) -> Path:
    """An environment with CMake and Ninja; call it with the cache locked."""
    lock = BUILD / "requirements-llama.txt"
    folder = cache / f"build-tools-{digest(lock.read_bytes(), sys.version, str(cache))}"
    if not (folder / "complete").exists():
        python = str(folder / "bin/python")
        base = getattr(sys, "_base_executable", sys.executable)
        pip = [python, "-m", "pip", "--disable-pip-version-check", "--no-input"]
        with step("installing the tools to build llama.cpp (10-30 seconds)"):
            venv = [base, "-m", "venv", "--clear", str(folder)]
            run_quietly(venv, "making a folder for the build tools")
            locked_only = ["--require-hashes", "--no-deps", "-r", str(lock)]
            run_quietly([*pip, "install", *locked_only], "pip install")
        (folder / "complete").touch()
    return folder


def source(cache: Path, work: Path) -> Path:
    """Fetches and unpacks llama-cpp-python's source below `work`; returns its folder."""
    python = str(tools(cache) / "bin/python")
    command = [python, "-m", "pip", "download", "--no-deps", "--no-build-isolation"]
    only = ["--no-binary", "llama-cpp-python", "--require-hashes"]
    with step("fetching llama.cpp's source, 77 MB (20-90 seconds)"):
        run_quietly([*command, *only, "--dest", str(work), "-r", str(LLAMA_LOCK)], "pip download")
        packed = next(work.glob("*.tar.gz"))
        with tarfile.open(packed) as archive:
            archive.extractall(work / "source", filter="data")
        packed.unlink()
    (unpacked,) = (work / "source").iterdir()
    return unpacked


def compile_wheel(work: Path, root: Path, programs: Path, log: Path) -> Path:
    # Without --no-cache-dir, pip may take a wheel that it once built with other flags.
    command = [
        *[str(programs / "bin/python"), "-m", "pip", "--disable-pip-version-check", "--no-input"],
        *["wheel", "--verbose", "--no-cache-dir", "--no-deps", "--no-build-isolation"],
        *["--wheel-dir", str(work), str(root)],
    ]
    environment = clean_environment() | {
        "CMAKE_ARGS": CMAKE_ARGS,
        "NINJA_STATUS": "[%f/%t] ",
        "PATH": f"{programs / 'bin'}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
        "TMPDIR": str(work),
    }
    preparing = "preparing to build llama.cpp"
    building = "building llama.cpp (5-12 minutes on 2 cores, once per version)"
    with log.open("w") as file:
        failed = follow(command, environment, file, preparing, building)
    if failed:
        message = f"llama.cpp did not build (see above, or all of {log}): mend it and run again"
        raise Stop(message, shown=first_error(log))
    return next(work.glob("*.whl"))


def first_error(log: Path) -> list[str]:
    """30 lines from where it first went wrong; the end of the log is mostly pip's noise."""
    lines = [line[:300] for line in log.read_text(errors="replace").splitlines()]
    bad = [number for number, line in enumerate(lines) if BUILD_ERROR.search(line)]
    start = bad[0] if bad else max(0, len(lines) - 30)
    return lines[start : start + 30]


def follow(
    command: list[str], environment: dict[str, str], log: TextIO, first: str, then: str
) -> int:
    """Runs a build, with its output in the log and its progress on standard error: it is called
    `first` until it compiles, and `then` from there on.  Returns its exit status."""
    with (
        step(first) as shown,
        subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        ) as process,
    ):
        try:
            for line in process.stdout or ():
                log.write(line)
                built = NINJA_STEP.match(line)
                if built and int(built[2]) > 9:  # fewer are CMake's trials of the compiler
                    shown.name, shown.detail = then, f"{built[1]}/{built[2]}"
        except BaseException:  # above all Ctrl-C: compilers must not go on without us
            os.killpg(process.pid, signal.SIGTERM)
            raise
    return process.returncode


def slim(wheel: Path, folder: Path) -> None:
    """Copies the wheel into the folder without what is to be left out, and beside it the headers,
    which other backends of ggml are compiled with."""
    folder.mkdir()
    with (
        zipfile.ZipFile(wheel) as whole,
        zipfile.ZipFile(folder / wheel.name, "w", zipfile.ZIP_DEFLATED) as rest,
    ):
        for entry in whole.infolist():
            if entry.filename.startswith("include/"):
                whole.extract(entry, folder)
            if re.match(LEFT_OUT, entry.filename):
                continue
            content = whole.read(entry)
            if entry.filename.endswith(".dist-info/RECORD"):
                lines = content.decode().splitlines(keepends=True)
                content = "".join(line for line in lines if not re.match(LEFT_OUT, line)).encode()
            entry.date_time = EARLIEST  # the same files make the same wheel, whenever it is built
            rest.writestr(entry, content)


def with_backend(wheel: Path, backend: Path, target: Path) -> None:
    """Writes to `target` the wheel with the files of a backend's folder beside libllama."""
    files = {
        f"llama_cpp/lib/{path.relative_to(backend)}": path
        for path in sorted(backend.rglob("*"))
        if path.is_file()
    }
    with (
        zipfile.ZipFile(wheel) as plain,
        zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as whole,
    ):
        for entry in plain.infolist():
            content = plain.read(entry)
            if entry.filename.endswith(".dist-info/RECORD"):
                lines = (record(name, path.read_bytes()) for name, path in files.items())
                content += "".join(lines).encode()
            whole.writestr(entry, content)
        for name, path in files.items():
            whole.write(path, name)


def record(name: str, content: bytes) -> str:
    """A file's line in a wheel's RECORD."""
    encoded = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
    return f"{name},sha256={encoded},{len(content)}\n"
