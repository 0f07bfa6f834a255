"""What pinaivu.spec puts into the executable beside what PyInstaller finds."""

from pathlib import Path
from typing import Any

import components
import glibc
import glibc_check
import older_glibc
import PyInstaller
from llama import compiler

from pinaivu_box.release.licenses import pack

Entry = tuple[str, str, str]  # name in the executable, file, kind
LOADER = Path(PyInstaller.__file__).parent / "bootloader" / PyInstaller.PLATFORM / "run"


def licenses(analysis: Any, work: str) -> Entry:
    """The file that `pinaivu licenses` reads (`release.licenses`)."""
    entries = [*analysis.pure, *analysis.binaries, *analysis.datas]
    files = (Path(source) for _, source, _ in entries if source and Path(source).is_file())
    target = Path(work) / "components.json.gz"
    target.write_bytes(pack(components.of_files(files)))
    return f"pinaivu_box/release/{target.name}", str(target), "DATA"


def binaries(entries: list[Entry], work: str) -> list[Entry]:
    """The libraries, so that older systems load them or say that they cannot."""
    folder = Path(work) / "libraries"
    folder.mkdir(exist_ok=True)
    found = [_lowered(entry, folder) for entry in entries]
    if not any(_is_python(name) for name, _, _ in found):  # not on Linux
        return found
    contents = ((name, Path(source).read_bytes()) for name, source, _ in found)
    return _checked(found, folder, glibc.baseline(contents).version)


def _checked(entries: list[Entry], folder: Path, needed: tuple[int, int]) -> list[Entry]:
    """With the library that opens libpython under its name (`glibc_check`)."""
    (python,) = (entry for entry in entries if _is_python(entry[0]))
    name, source, kind = python
    moved = f"{glibc_check.FOLDER}/{name}"
    check = folder / "check" / name  # `folder` has the real one under its name
    check.parent.mkdir(exist_ok=True)
    functions = glibc_check.functions(LOADER.read_bytes())
    glibc_check.make(check, compiler(), moved, needed, functions)
    others = [entry for entry in entries if entry is not python]
    return [*others, (name, str(check), kind), (moved, source, kind)]


def _is_python(name: str) -> bool:
    return name.startswith("libpython3.") and ".so" in name


def _lowered(entry: Entry, folder: Path) -> Entry:
    name, source, kind = entry
    changed = older_glibc.lowered(Path(source).read_bytes()) if kind != "SYMLINK" else None
    if changed is None:
        return entry
    target = folder / name
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(changed)
    return name, str(target), kind
