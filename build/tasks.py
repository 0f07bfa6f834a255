"""What build/test and build/binary do once .venv is set up."""

import mmap
import shutil
import struct
import subprocess
import tempfile
import time
from pathlib import Path

import llama
from common import BUILD, CMAKE_ARGS, MODEL, ROOT, VENV, Stop, say
from environment import PYTHON, cache, locked, need_space, run_quietly, set_up_clients
from progress import step

# PyInstaller's mark at the end of its archive: magic, the length from the archive's start up to
# here, then the place of the table of contents in it and Python's version and library.
COOKIE = struct.Struct("!8sI76s")
COOKIE_MAGIC = b"MEI\014\013\012\013\016"
# Turing to Hopper and Ada; code for newer ones is made from the last when the driver loads it.
CUDA_ARCHITECTURES = "75-real;80-real;86-real;89-real;90"
MODEL_FOOTER = 64  # pinaivu_box.models.bundled ends the file with this many bytes of its own

# Tests of a file share processes, and wait for them most of the time: six workers keep two cores
# busy.  The order of files is that of tests/conftest.py.
PYTEST = ["pytest", "-n", "6", "--dist", "loadfile", "--no-loadscope-reorder"]
CHECKS = [
    ["ruff", "format", "--check"],
    ["ruff", "check"],
    ["mypy"],
    [*PYTEST, "--durations", "50"],
]
# Branches of the package, by tests that start no box: tracing makes those more than twice as slow,
# and would do the same to each of thousands of child processes.
COVERAGE = [*PYTEST, "-m", "in_process", "--cov", "--cov-report", "term"]


def test(arguments: list[str]) -> None:
    """All checks, even after one failed; with arguments only pytest, which gets them.
    `--coverage` alone: the tests that start no box, and how many branches they take."""
    set_up_clients()
    checks = [["pytest", *arguments]] if arguments else CHECKS
    if arguments == ["--coverage"]:
        checks = [COVERAGE]
    failed = []
    for check in checks:
        say(" ".join(check))
        if subprocess.run([PYTHON, "-m", *check], cwd=ROOT, check=False).returncode:
            failed.append(" ".join(check))
    if failed:
        raise Stop(f"failed: {', '.join(failed)}")
    say("all passed")


def binary(arguments: list[str]) -> None:
    if arguments:
        raise Stop("build/binary takes no arguments: run it without")
    need_space(ROOT, 600)
    with locked(BUILD):
        make_executable(VENV / "pyinstaller", ROOT / "dist/pinaivu")


def make_executable(work: Path, target: Path) -> None:
    folders = ["--distpath", str(work / "dist"), "--workpath", str(work)]
    options = ["--noconfirm", "--log-level", "WARN", *folders, str(ROOT / "pinaivu.spec")]
    with step("freezing pinaivu (about a minute)"):
        run_quietly([str(PYTHON), "-m", "PyInstaller", *options], "PyInstaller")

    made = work / "dist/pinaivu"
    append = [str(PYTHON), "-m", "pinaivu_box.models.bundled", str(made), str(MODEL)]
    with step("appending the default model"):
        run_quietly(append, "appending the model")
        repeat_cookie(made)
        seconds = start_up_time(made)
    target.parent.mkdir(exist_ok=True)
    shutil.move(made, target)
    size = target.stat().st_size / 1e6
    say(f"made dist/pinaivu: {size:.0f} MB, `--version` in {seconds:.1f} s")


def wheel(arguments: list[str]) -> None:
    """llama-cpp-python's wheel in dist/; with --cuda also its CUDA backend, as its own library."""
    if arguments[:1] not in ([], ["--cuda"]) or len(arguments) > 2:
        raise Stop("it is build/wheel, or build/wheel --cuda [ARCHITECTURES], such as 80;86;90")
    cmake_args = CMAKE_ARGS
    if arguments:
        if not shutil.which("nvcc"):
            raise Stop("--cuda needs NVIDIA's CUDA toolkit with nvcc on the PATH: install it first")
        architectures = arguments[1] if len(arguments) == 2 else CUDA_ARCHITECTURES
        cmake_args += f" -DGGML_CUDA=ON -DCMAKE_CUDA_ARCHITECTURES={architectures}"
    made = llama.wheel(cache(), cmake_args)
    target = ROOT / "dist" / made.name
    target.parent.mkdir(exist_ok=True)
    shutil.copyfile(made, target)
    say(f"made dist/{made.name}: install it with pip, with --force-reinstall over another build")


def repeat_cookie(executable: Path) -> None:
    """Puts PyInstaller's cookie behind the model as well.

    Its loader looks for it from the end of the file on: each start would read through the model,
    which takes 0.4 s.
    """
    with executable.open("r+b") as file:
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            first = content.rfind(COOKIE_MAGIC)
            magic, length, rest = COOKIE.unpack_from(content, first)
            second = len(content) - MODEL_FOOTER
            footer = content[second:]
        file.seek(second)
        file.write(COOKIE.pack(magic, length + second - first, rest) + footer)


def start_up_time(executable: Path) -> float:
    """Runs it in an empty folder without any environment: it must not need this clone."""
    with tempfile.TemporaryDirectory() as empty:
        started = time.monotonic()
        run_alone = [str(executable), "--version"]
        done = subprocess.run(run_alone, cwd=empty, env={}, check=False, capture_output=True)
        seconds = time.monotonic() - started
    if done.returncode:
        message = "the executable does not start (see above): add what it misses to pinaivu.spec"
        raise Stop(message, shown=done.stderr.decode(errors="replace").splitlines())
    return seconds


RUN = {"test": test, "binary": binary, "wheel": wheel}
