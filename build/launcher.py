"""The launcher, which begins the executable: compiled with zstd's own source, kept in the cache."""

import os
import shutil
import subprocess
import tarfile
from pathlib import Path

from common import BUILD, Stop, digest
from environment import PYTHON, locked, run_quietly, scratch
from llama import compiler
from progress import step

SOURCES = BUILD / "launcher"
ZSTD_LOCK = BUILD / "zstd.txt"  # a package that has zstd's source in it
# Of zstd, what decompresses; its assembler is for some processors only.
ZSTD = ("common/[!tp]*.c", "decompress/*.c")
FLAGS = (
    *("-std=gnu11", "-O2", "-Wall", "-DZSTD_DISABLE_ASM", "-ffunction-sections", "-fdata-sections"),
    *("-Wl,--gc-sections", "-Wl,--build-id=none", "-s"),
)


def launcher(cache: Path) -> Path:
    """Its path in the cache; compiles it first if it is not there."""
    sources = sorted(SOURCES.iterdir())
    made_of = [*FLAGS, ZSTD_LOCK.read_bytes(), os.uname().machine]
    made = cache / f"launcher-{digest(*made_of, *(path.read_bytes() for path in sources))}"
    with locked(cache):
        if not made.exists():
            zstd = zstd_source(cache)
            work = scratch(cache)
            with step("compiling the launcher (10 seconds, once)"):
                compile_launcher(work / "launcher", zstd)
            (work / "launcher").rename(made)
            shutil.rmtree(work)
    return made


def zstd_source(cache: Path) -> Path:
    """zstd's source in the cache, its folder `lib`; call it with the cache locked."""
    folder = cache / f"zstd-{digest(ZSTD_LOCK.read_bytes())}"
    if not folder.exists():
        work = scratch(cache)
        command = [str(PYTHON), "-m", "pip", "--disable-pip-version-check", "download", "--no-deps"]
        only = ["--no-binary", ":all:", "--require-hashes", "-r", str(ZSTD_LOCK)]
        with step("fetching zstd's source (5-20 seconds, once)"):
            run_quietly([*command, *only, "--dest", str(work)], "pip download")
        with tarfile.open(next(work.glob("*.tar.gz"))) as archive:
            archive.extractall(work / "source", filter="data")
        next((work / "source").glob("*/src/c/zstd/lib")).rename(folder)
        shutil.rmtree(work)
    return folder


def compile_launcher(target: Path, zstd: Path) -> None:
    """Linked statically, so that it starts on any system and can say what the program lacks there;
    where there is no static C library, against the system's."""
    files = [*SOURCES.glob("*.c"), *(path for part in ZSTD for path in zstd.glob(part))]
    command = [*compiler().split(), *FLAGS, f"-I{zstd}", *map(str, sorted(files))]
    command += ["-o", str(target)]
    for more in (["-static"], []):
        done = subprocess.run([*command, *more], capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return
    message = "the launcher did not compile (see above): mend build/launcher and run it again"
    raise Stop(message, shown=done.stderr.splitlines()[:30])
