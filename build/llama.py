"""The llama-cpp-python wheel: compiled once per version and flags, then kept in the cache."""

import os
import re
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

from common import BUILD, CMAKE_ARGS, LEFT_OUT, LLAMA_LOCK, Stop, llama_key
from environment import clean_environment, locked, need_space, run_quietly, scratch
from progress import step

NINJA_STEP = re.compile(r"\s*\[(\d+)/(\d+)\] ")
BUILD_ERROR = re.compile(r"\bFAILED: |CMake Error|^ERROR: ")


def wheel(cache: Path, cmake_args: str = CMAKE_ARGS) -> Path:
    """The wheel's path in the cache; builds it first if it is not there."""
    version = LLAMA_LOCK.read_text().partition("==")[2].split()[0]
    folder = cache / f"llama-cpp-python-{version}-{llama_key(cmake_args)}"
    with locked(cache):
        if not folder.exists():
            check_compiler()
            need_space(cache, 1500)
            work = scratch(cache)
            made = compile_wheel(work, cache / "llama-cpp-python.log", cmake_args)
            with step("packing it"):
                slim(made, work / "done")
            (work / "done").rename(folder)
            shutil.rmtree(work)
    return next(folder.glob("*.whl"))


def check_compiler() -> None:
    for variable, language, names in [
        ("CC", "C", ["cc", "gcc", "clang"]),
        ("CXX", "C++", ["c++", "g++", "clang++"]),
    ]:
        if os.environ.get(variable) or any(shutil.which(name) for name in names):
            continue
        raise Stop(
            f"a {language} compiler is needed to build llama.cpp: install one"
            " (Debian, Ubuntu: apt install g++)"
        )


def compile_wheel(work: Path, log: Path, cmake_args: str) -> Path:
    tools = work / "tools"
    python = str(tools / "bin/python")
    base = getattr(sys, "_base_executable", sys.executable)
    pip = [python, "-m", "pip", "--disable-pip-version-check", "--no-input"]
    lock = str(BUILD / "requirements-llama.txt")
    with step("installing the tools to build llama.cpp (10-30 seconds)"):
        run_quietly([base, "-m", "venv", str(tools)], "making a folder for the build tools")
        run_quietly([*pip, "install", "--require-hashes", "--no-deps", "-r", lock], "pip install")
    # Without --no-cache-dir, pip may take a wheel that it once built with other flags.
    command = [
        *[*pip, "wheel", "--verbose", "--no-cache-dir", "--no-deps", "--no-build-isolation"],
        *["--no-binary", "llama-cpp-python", "--require-hashes"],
        *["--wheel-dir", str(work), "-r", str(LLAMA_LOCK)],
    ]
    environment = clean_environment() | {
        "CMAKE_ARGS": cmake_args,
        "NINJA_STATUS": "[%f/%t] ",
        "PATH": f"{tools / 'bin'}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
        "TMPDIR": str(work),
    }
    if follow(command, environment, log):
        message = f"llama.cpp did not build (see above, or all of {log}): mend it and run again"
        raise Stop(message, shown=first_error(log))
    return next(work.glob("*.whl"))


def first_error(log: Path) -> list[str]:
    """30 lines from where it first went wrong; the end of the log is mostly pip's noise."""
    lines = [line[:300] for line in log.read_text(errors="replace").splitlines()]
    bad = [number for number, line in enumerate(lines) if BUILD_ERROR.search(line)]
    start = bad[0] if bad else max(0, len(lines) - 30)
    return lines[start : start + 30]


def follow(command: list[str], environment: dict[str, str], log: Path) -> int:
    """Runs the build, with its output in the log and its progress on standard error."""
    with (
        step("fetching llama.cpp's source, 77 MB (20-90 seconds)") as shown,
        log.open("w") as file,
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
                file.write(line)
                built = NINJA_STEP.match(line)
                if built and int(built[2]) > 9:  # fewer are CMake's trials of the compiler
                    shown.name = "building llama.cpp (5-12 minutes on 2 cores, once per version)"
                    shown.detail = f"{built[1]}/{built[2]}"
        except BaseException:  # above all Ctrl-C: compilers must not go on without us
            os.killpg(process.pid, signal.SIGTERM)
            raise
    return process.returncode


def slim(wheel: Path, folder: Path) -> None:
    """Copies the wheel into the folder without what is to be left out."""
    folder.mkdir()
    with (
        zipfile.ZipFile(wheel) as whole,
        zipfile.ZipFile(folder / wheel.name, "w", zipfile.ZIP_DEFLATED) as rest,
    ):
        for entry in whole.infolist():
            if re.match(LEFT_OUT, entry.filename):
                continue
            content = whole.read(entry)
            if entry.filename.endswith(".dist-info/RECORD"):
                lines = content.decode().splitlines(keepends=True)
                content = "".join(line for line in lines if not re.match(LEFT_OUT, line)).encode()
            rest.writestr(entry, content)
