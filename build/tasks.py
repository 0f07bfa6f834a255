"""What build/test and build/binary do once .venv is set up."""

import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import glibc
import gpu
import launcher
import llama
from common import BUILD, MODEL, ROOT, VENV, Stop, say
from environment import PYTHON, cache, locked, need_space, run_quietly, set_up_clients
from progress import step
from release import release, reproducible

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
    # Otherwise every worker would: pytest compiles each test file anew, with what its assertions
    # are to tell.  The type checker leaves a core idle meanwhile.
    compiling = None if arguments else start_quietly("pytest", "--collect-only", "-q")
    failed = []
    for check in checks:
        say(" ".join(check))
        if check[0] == "pytest" and compiling:
            compiling.wait()
        if subprocess.run([PYTHON, "-m", *check], cwd=ROOT, check=False).returncode:
            failed.append(" ".join(check))
    if failed:
        raise Stop(f"failed: {', '.join(failed)}")
    say("all passed")


def start_quietly(*module: str) -> subprocess.Popen:
    """A module of .venv that may write bytecode, whatever the environment says."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return subprocess.Popen(
        [PYTHON, "-m", *module],
        cwd=ROOT,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def binary(arguments: list[str]) -> None:
    """The executable in dist/; with --cuda or --vulkan one that carries this backend as a payload,
    and with --cublas also a payload with cuBLAS, to be put beside it.  --any-glibc: also if it
    needs a newer glibc than a release may."""
    any_glibc = "--any-glibc" in arguments
    choice, rest = gpu.read_options([one for one in arguments if one != "--any-glibc"])
    gpu.refuse(rest, "binary")
    need_space(ROOT, 3000 if choice.with_cublas else 1000)
    made = gpu.make(choice) if choice.kind else None
    name = f"pinaivu-{choice.kind}" if choice.kind else "pinaivu"
    with locked(BUILD):
        work = VENV / "pyinstaller"
        payloads = [make_payloads(work, choice, made)] if made else []
        frozen = freeze(work)
        check_glibc(frozen, [made.folder] if made else [], any_glibc)
        put_together(frozen, ROOT / "dist" / name, payloads)


def make_payloads(work: Path, choice: gpu.BackendChoice, made: gpu.Made) -> Path:
    """The payload with the backend.  One with cuBLAS goes into dist/ if it is wanted."""
    work.mkdir(exist_ok=True)
    script = [str(PYTHON), str(BUILD / "payloads.py"), "make"]
    beside = ROOT / "dist/pinaivu-cublas.payload"
    companions = [str(beside)] if choice.with_cublas else []
    if choice.with_cublas:
        beside.parent.mkdir(exist_ok=True)
        with step("packing cuBLAS (1-3 minutes)"):
            cublas = gpu.cublas_folder(work, made)
            run_quietly([*script, str(beside), "cublas", str(cublas)], "packing cuBLAS")
        say(f"made dist/{beside.name}: {beside.stat().st_size / 1e6:.0f} MB")
    target = work / f"{choice.kind}.payload"
    with step(f"packing the {choice.kind} backend (10-30 seconds)"):
        files = [str(target), choice.kind, str(made.folder), *companions]
        run_quietly([*script, *files], "packing the backend")
    return target


def freeze(work: Path) -> Path:
    """The executable without model and payloads, in `work`."""
    start = launcher.launcher(cache())
    folders = ["--distpath", str(work / "dist"), "--workpath", str(work)]
    options = ["--noconfirm", "--log-level", "WARN", *folders, str(ROOT / "pinaivu.spec")]
    with step("freezing pinaivu (about a minute)"):
        command = [str(PYTHON), "-m", "PyInstaller", *options]
        run_quietly(command, "PyInstaller", more=reproducible())
    made = work / "pinaivu.frozen"
    with step("packing the program (6 seconds)"):
        parts = [str(made), str(start), str(work / "dist/pinaivu")]
        run_quietly([str(PYTHON), str(BUILD / "program.py"), *parts], "packing the program")
    return made


def check_glibc(frozen: Path, backends: list[Path], any_glibc: bool = False) -> None:
    """Says which glibc the executable needs.  Raises Stop if a release may not need it."""
    script = [str(PYTHON), str(BUILD / "baseline.py"), str(frozen), *map(str, backends)]
    done = subprocess.run(script, capture_output=True, text=True, check=True)
    major, minor, file = done.stdout.split(maxsplit=2)
    need = glibc.GlibcNeed((int(major), int(minor)), file.strip())
    if not need.version[0]:  # not on Linux
        return
    say(f"the executable needs {need}")
    if need.version > glibc.NEWEST and not any_glibc:
        newest = ".".join(map(str, glibc.NEWEST))
        raise Stop(
            f"it would not start where glibc is {newest}, as a release has to: build it on an "
            "older system, such as Ubuntu 22.04, or say --any-glibc to have it for newer ones"
        )


def put_together(frozen: Path, target: Path, payloads: list[Path]) -> None:
    """The executable at `target`: what `freeze` made, with payloads and the default model."""
    target.parent.mkdir(exist_ok=True)
    made = target.with_name(f"{target.name}.new")
    shutil.copy2(frozen, made)
    parts = [str(made), str(MODEL), *map(str, payloads)]
    with step("appending the default model"):
        assemble = [str(PYTHON), str(BUILD / "payloads.py"), "assemble", *parts]
        run_quietly(assemble, "appending the model")
        first, later = start_up_times(made)
    made.replace(target)
    size = target.stat().st_size / 1e6
    say(
        f"made dist/{target.name}: {size:.0f} MB, `--version` in {first:.2f} s, later {later:.2f} s"
    )


def wheel(arguments: list[str]) -> None:
    """llama-cpp-python's wheel in dist/; with --cuda or --vulkan also this backend, as its own
    library."""
    choice, rest = gpu.read_options(arguments)
    gpu.refuse(rest, "wheel")
    made = llama.wheel(cache())
    target = ROOT / "dist" / made.name
    target.parent.mkdir(exist_ok=True)
    if choice.kind:
        backend = gpu.make(choice).folder
        with step(f"adding the {choice.kind} backend"):
            llama.with_backend(made, backend, target)
    else:
        shutil.copyfile(made, target)
    say(f"made dist/{made.name}: install it with pip, with --force-reinstall over another build")


def start_up_times(executable: Path) -> tuple[float, float]:
    """Runs it twice in an empty folder, with an empty cache: it must not need this clone.  Returns
    the seconds of the first start, which unpacks the program, and of the second."""
    times = []
    with tempfile.TemporaryDirectory() as empty:
        for _ in range(2):
            started = time.monotonic()
            alone = {"cwd": empty, "env": {"XDG_CACHE_HOME": f"{empty}/cache"}}
            done = subprocess.run(
                [executable, "--version"], **alone, check=False, capture_output=True
            )
            times.append(time.monotonic() - started)
            if done.returncode:
                message = "the executable does not start (see above): mend pinaivu.spec"
                raise Stop(message, shown=done.stderr.decode(errors="replace").splitlines())
    return times[0], times[1]


RUN = {"test": test, "binary": binary, "wheel": wheel, "release": release}
