"""What `--cuda` and `--vulkan` of build/run, build/binary and build/wheel have in common."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from common import VENV, Stop
from environment import cache

BACKENDS = VENV / "share/pinaivu/backends"  # where the package looks for those that came with it
KINDS = ("cuda", "vulkan")
USAGE = "--cuda [--arch ARCHITECTURES], or --vulkan"


@dataclass(frozen=True)
class BackendChoice:
    """`kind` is "" for none; `architectures` "" for those of the GPUs here."""

    kind: str = ""
    architectures: str = ""
    with_cublas: bool = False


@dataclass(frozen=True)
class Made:
    """The folder with the backend; the one with cuBLAS, if it needs that."""

    folder: Path
    cublas: Path | None = None


def read_options(arguments: list[str]) -> tuple[BackendChoice, list[str]]:
    """The choice at the beginning of the arguments, and the others."""
    kind = architectures = ""
    with_cublas = False
    rest = list(arguments)
    while rest and rest[0].startswith("--"):
        name, equals, value = rest[0].partition("=")
        if name.removeprefix("--") in KINDS and not kind:
            kind = name.removeprefix("--")
        elif name == "--arch" and kind == "cuda" and (equals or len(rest) > 1):
            architectures = value if equals else rest.pop(1)
        elif name == "--cublas" and kind == "cuda":
            with_cublas = True
        else:
            break
        rest.pop(0)
    return BackendChoice(kind, architectures, with_cublas), rest


def make(choice: BackendChoice) -> Made:
    """Compiles the backend unless the cache has it."""
    if choice.kind == "vulkan":
        import vulkan

        return Made(vulkan.made(cache()))
    import cuda

    return Made(*cuda.made(cache(), choice.architectures))


def install(choice: BackendChoice) -> None:
    """Puts the backend where this clone's package finds it."""
    made = make(choice)
    folder = BACKENDS / choice.kind
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for path in [*made.folder.iterdir(), *libraries(made)]:
        (folder / path.name).symlink_to(path)


def libraries(made: Made) -> list[Path]:
    """The files of cuBLAS that are loaded: `libcublas.so.13` and such."""
    found = sorted(made.cublas.glob("libcublas*.so.*")) if made.cublas else []
    return [path for path in found if path.suffix[1:].isdigit() and path.name.count(".") == 2]


def cublas_folder(work: Path, made: Made) -> Path:
    """cuBLAS as it is given to others: with its licence."""
    folder = work / "cublas"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for path in libraries(made):
        (folder / path.name).symlink_to(path)
    root = made.cublas.parents[2] if made.cublas else folder
    licence = next(root.glob("nvidia_cublas-*.dist-info/licenses/License.txt"), None)
    if not licence:
        raise Stop(
            "cuBLAS is given away only with its licence, which NVIDIA's Python package has: "
            "hide this machine's toolkit, so that theirs is fetched"
        )
    (folder / "LICENSE.cublas.txt").symlink_to(licence)
    return folder


def refuse(rest: list[str], command: str) -> None:
    if rest:
        raise Stop(f"build/{command} does not know {rest[0]!r}: it takes {USAGE}, or nothing")
