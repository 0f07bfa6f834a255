"""Which glibc a program needs, and what is said where it is older."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from tests.support import fake_gpu
from tests.support.build_scripts import build_module

# Version 2 of a library has a function that version 1 lacks.
VERSIONS = "GLIBC_2.2 { global: old; local: *; }; GLIBC_2.77 { global: new; } GLIBC_2.2;"
OLD_VERSIONS = "GLIBC_2.2 { global: old; local: *; };"
LIBRARY = "int old(void) { return 1; }\n"
USER = "int old(void); int new(void); int both(void) { return old() + new(); }\n"


def compiler() -> list[str]:
    return [str(part) for part in fake_gpu.compiler("cc", "gcc", "clang")]


def compiled(path: Path, code: str, *more: str | Path) -> Path:
    options = ["-shared", "-fPIC", "-o", str(path), "-x", "c", "-", "-x", "none", *map(str, more)]
    subprocess.run([*compiler(), *options], input=code, text=True, check=True)
    return path


def versioned(folder: Path, code: str, versions: str) -> Path:
    folder.mkdir()
    (folder / "versions").write_text(versions)
    script = f"-Wl,--version-script={folder / 'versions'}"
    return compiled(folder / "libversioned.so", code, script, "-Wl,-soname,libversioned.so")


@pytest.fixture
def user(tmp_path: Path) -> Path:
    """A library that was linked with version 2, and beside it, version 1."""
    new = versioned(tmp_path / "new", LIBRARY + "int new(void) { return 2; }\n", VERSIONS)
    versioned(tmp_path / "old", LIBRARY, OLD_VERSIONS)
    return compiled(tmp_path / "libuser.so", USER, new)


@pytest.fixture
def glibc() -> Iterator[ModuleType]:
    with build_module("glibc") as module:
        yield module


@pytest.fixture
def older_glibc() -> Iterator[ModuleType]:
    with build_module("older_glibc") as module:
        yield module


def loads(library: Path, folder: Path, function: str) -> subprocess.CompletedProcess[str]:
    """In another process, with the libraries of that folder."""
    code = f"import ctypes; print(ctypes.CDLL({str(library)!r}).{function}())"
    environment = {**os.environ, "LD_LIBRARY_PATH": str(folder)}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )


def test_the_newest_version_is_found_and_who_needs_it(
    glibc: ModuleType, user: Path, tmp_path: Path
) -> None:
    assert glibc.newest(user.read_bytes()) == (2, 77)
    (tmp_path / "more").mkdir()
    (tmp_path / "more/text").write_text("GLIBC_2.99")
    (tmp_path / "more/libuser.so").write_bytes(user.read_bytes())
    (tmp_path / "more/libplain.so").write_bytes((tmp_path / "old/libversioned.so").read_bytes())
    need = glibc.baseline(glibc.below(tmp_path / "more"))
    assert str(need) == "glibc 2.77 (libuser.so)"


@pytest.mark.skipif(not shutil.which("readelf"), reason="there is no readelf")
def test_it_reads_what_readelf_reads(glibc: ModuleType) -> None:
    """Of every library that this Python has loaded."""
    import nacl.bindings  # noqa: F401

    lines = Path("/proc/self/maps").read_text().splitlines()
    paths = {line.split()[-1] for line in lines if ".so" in line}
    assert len(paths) > 5
    for path in sorted(paths):
        shown = subprocess.run(
            ["readelf", "--version-info", "--wide", path], capture_output=True, text=True
        ).stdout.partition("Version needs section")[2]  # fmt: skip
        found = set(re.findall(r"Name: (\S+)  Flags: none", shown))
        assert glibc.versions(Path(path).read_bytes()) == found, path


def test_a_file_that_is_cut_off_is_no_crash(glibc: ModuleType, user: Path) -> None:
    content = user.read_bytes()
    with pytest.raises(ValueError, match="damaged"):
        glibc.newest(content[:200])
    with pytest.raises(glibc.NotElf):
        glibc.newest(b"#!/bin/sh\n")


def test_a_library_without_the_version_loads_once_somebody_else_has_the_function(
    older_glibc: ModuleType, user: Path, tmp_path: Path
) -> None:
    assert loads(user, tmp_path / "new", "both").stdout == "3\n"
    assert "GLIBC_2.77' not found" in loads(user, tmp_path / "old", "both").stderr
    changed = older_glibc.lowered(user.read_bytes(), frozenset({"new"}))
    lowered = tmp_path / "liblowered.so"
    lowered.write_bytes(changed)
    assert "undefined symbol: new" in loads(lowered, tmp_path / "old", "both").stderr
    # The function of the system, or else of whatever is there for all.
    assert loads(lowered, tmp_path / "new", "both").stdout == "3\n"
    other = compiled(tmp_path / "libother.so", "int new(void) { return 40; }\n")
    code = (
        f"import ctypes; ctypes.CDLL({str(other)!r}, ctypes.RTLD_GLOBAL);"
        f"print(ctypes.CDLL({str(lowered)!r}).both())"
    )
    environment = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path / "old")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.stdout == "41\n", done.stderr


def test_versions_that_something_else_needs_are_kept(
    older_glibc: ModuleType, glibc: ModuleType, user: Path
) -> None:
    assert older_glibc.lowered(user.read_bytes(), frozenset({"absent"})) is None
    assert older_glibc.lowered(b"text", frozenset({"new"})) is None
    changed = older_glibc.lowered(user.read_bytes(), frozenset({"new"}))
    assert glibc.newest(changed) < (2, 77) and "GLIBC_2.2" in glibc.versions(changed)


# -- the sentence ----------------------------------------------------------------------------------


def check_library(folder: Path, needed: tuple[int, int], code: str) -> Path:
    """The library of glibc_check.c for a Python that consists of `code`."""
    (folder / "python").mkdir()
    compiled(folder / "python/libpython3.so", code)
    target = folder / "libpython3.so"
    with build_module("glibc_check") as script:
        names = ["Py_One", "Py_Two"]
        script.make(target, " ".join(compiler()), "python/libpython3.so", needed, names)
    return target


PYTHON = "int Py_One(void) { return 1; } int Py_Two(int n) { return n * 2; }"


def call(library: Path, expression: str) -> subprocess.CompletedProcess[str]:
    code = f"import ctypes; library = ctypes.CDLL({str(library)!r}); print({expression})"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_a_new_enough_system_gets_the_functions_of_python(tmp_path: Path) -> None:
    library = check_library(tmp_path, (2, 17), PYTHON)
    done = call(library, "library.Py_One() + library.Py_Two(21)")
    assert done.stdout == "43\n", done.stderr


# What each says of a file, a folder that is none, and an address in libc: (status, content).
SAME = """
import ctypes, os
library, libc = ctypes.CDLL({library!r}), ctypes.CDLL(None)
def of(where, name, *arguments):
    found = ctypes.create_string_buffer(256)
    return getattr(where, name)(*arguments, found), found.raw
file = os.open({library!r}, os.O_RDONLY)
for name, *arguments in (
    ("stat", b"/"), ("stat64", b"/proc/self/exe"), ("lstat", b"/proc/self/exe"),
    ("lstat64", b"/absent"), ("fstat", file), ("fstat64", file), ("fstat", -1),
):
    if hasattr(libc, name):
        assert of(library, name, *arguments) == of(libc, name, *arguments), name
assert library.arc4random() != library.arc4random()
assert library.close_range(file, file, 0) in (0, -1)
if hasattr(libc, "_dl_find_object"):
    address = ctypes.cast(libc.write, ctypes.c_void_p)
    (ours, mine), (theirs, other) = (of(one, "_dl_find_object", address) for one in (library, libc))
    assert ours == theirs == 0
    assert mine[32:40] == other[32:40]  # where what unwinds the stack is
    assert of(library, "_dl_find_object", ctypes.c_void_p(8))[0] == -1
"""


def test_the_functions_for_older_systems_do_what_those_of_glibc_do(tmp_path: Path) -> None:
    library = check_library(tmp_path, (2, 17), PYTHON)
    code = SAME.format(library=str(library))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_function_that_is_listed_as_supplied_is_there(
    older_glibc: ModuleType, tmp_path: Path
) -> None:
    library = check_library(tmp_path, (2, 17), PYTHON)
    listed = sorted(older_glibc.SUPPLIED)
    assert call(library, f"[name for name in {listed} if not hasattr(library, name)]").stdout == (
        "[]\n"
    )


def test_an_old_system_gets_a_sentence(tmp_path: Path) -> None:
    done = call(check_library(tmp_path, (2, 777), PYTHON), "1")
    assert done.returncode == 1 and done.stdout == ""
    version = os.confstr("CS_GNU_LIBC_VERSION") or ""
    assert done.stderr.startswith(
        f"pinaivu: this system has {version}, and this program needs glibc 2.777 or newer: "
    )
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("lacking", ["library", "function"])
def test_a_python_that_is_not_whole_is_one_line(tmp_path: Path, lacking: str) -> None:
    library = check_library(tmp_path, (2, 17), "int Py_One(void) { return 1; }")
    if lacking == "library":
        (tmp_path / "python/libpython3.so").unlink()
    done = call(library, "1")
    assert done.returncode == 1 and done.stderr.startswith("pinaivu: Python cannot be loaded: ")
    assert done.stderr.count("\n") == 1


def test_the_library_that_checks_loads_everywhere(glibc: ModuleType, tmp_path: Path) -> None:
    library = check_library(tmp_path, (2, 17), PYTHON)
    assert glibc.versions(library.read_bytes()) == set()
