"""What the fast path of build/run needs: paths, stamps and messages. Import little here."""

import hashlib
import os
import sys
from pathlib import Path

BUILD = Path(__file__).resolve().parent
ROOT = BUILD.parent
VENV = ROOT / ".venv"
STAMPS = VENV / "setup-stamps"
MODEL = VENV / "share/pinaivu/models/smollm2-135m.gguf"
CLIENTS = VENV / "clients"  # an environment of its own: see pyproject.toml
LOCKS = {
    "run": BUILD / "requirements.txt",
    "dev": BUILD / "requirements-dev.txt",
    "clients": BUILD / "requirements-clients.txt",
    "release": BUILD / "requirements-release.txt",
}
LLAMA_LOCK = BUILD / "llama-cpp-python.txt"
LLAMA_PATCH = BUILD / "llama.patch"
MODEL_LOCK = BUILD / "model.txt"

# A portable build: all CPU variants, the best of which is picked at run time. Without the two
# install directories the variants land where libllama does not look; with versioned sonames a
# wheel, which cannot hold symlinks, would carry three copies of each library.
CMAKE_ARGS = " ".join(
    [
        "-DGGML_NATIVE=OFF",
        "-DGGML_BACKEND_DL=ON",
        "-DGGML_CPU_ALL_VARIANTS=ON",
        "-DCMAKE_INSTALL_BINDIR=llama_cpp/lib",
        "-DCMAKE_INSTALL_LIBDIR=llama_cpp/lib",
        "-DCMAKE_PLATFORM_NO_VERSIONED_SONAME=ON",
    ]
)

# Of the wheel, what nothing needs at run time, and the variant for AMX: GCC 12 drops its tile
# configuration (llama.cpp's pull request 26954), and it ends with an illegal instruction. Such
# processors run the next best variant, AVX-512 with VNNI and BF16.
LEFT_OUT = (
    r"include/|bin/|llama_cpp/lib/"
    r"(cmake/|pkgconfig/|libllama-common\.|libggml-cpu-sapphirerapids\.)"
)


class Stop(Exception):
    """Ends the setup with its message: one sentence that says what to do.  `shown` are the lines of
    output that it refers to."""

    def __init__(self, message: str, shown: list[str] | None = None) -> None:
        super().__init__(message)
        self.shown = shown or []


def say(message: str) -> None:
    """Standard output belongs to the program that we start; ours is standard error."""
    print(f"build: {message}", file=sys.stderr, flush=True)


def digest(*parts: str | bytes) -> str:
    joined = b"\0".join(part.encode() if isinstance(part, str) else part for part in parts)
    return hashlib.sha256(joined).hexdigest()[:12]


def llama_key() -> str:
    """Names a build of llama.cpp: the same source and flags, and the same patch."""
    return digest(source_key(), LLAMA_PATCH.read_bytes())


def source_key() -> str:
    """Names what any part of llama.cpp is built from: the same flags, contents, source and kind of
    machine."""
    parts = (CMAKE_ARGS, LEFT_OUT, LLAMA_LOCK.read_bytes(), sys.platform, os.uname().machine)
    return digest(*parts)


def model_key() -> str:
    """Names the default model's file: the package that it is from, and what is done with it."""
    return digest(MODEL_LOCK.read_bytes(), (BUILD / "requantise.py").read_bytes())


def expected_stamps(kind: str) -> dict[str, set[str]]:
    """Step -> the stamps that mean that it is done."""
    locks = ["dev"] if kind == "dev" else ["run", "dev"]  # the dev lock is a superset
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    return {
        # Scripts in a virtual environment hold its path, so a moved clone needs a new one.
        "venv": {digest(str(ROOT), version)},
        "packages": {digest(LOCKS[lock].read_bytes()) for lock in locks},
        "llama": {llama_key()},
        "model": {model_key()},
        "package": {digest(str(ROOT), (BUILD / "environment.py").read_bytes())},
    }


def read_stamps() -> dict[str, str]:
    try:
        return dict(line.split() for line in STAMPS.read_text().splitlines())
    except FileNotFoundError:
        return {}


def write_stamp(step: str, stamp: str) -> None:
    stamps = read_stamps() | {step: stamp}
    STAMPS.write_text("".join(f"{name} {value}\n" for name, value in stamps.items()))


def outdated(expected: dict[str, set[str]]) -> list[str]:
    stamps = read_stamps()
    steps = [step for step, good in expected.items() if stamps.get(step) not in good]
    if "model" not in steps and not MODEL.exists():
        steps.append("model")
    return steps
