"""build/patching.py: a patch is applied as a whole, to the very text that it was made for."""

from __future__ import annotations

import difflib
import importlib
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from tests.support.paths import ROOT

BUILD = ROOT / "build"


@pytest.fixture
def patching(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(BUILD))
    before = set(sys.modules)
    yield importlib.import_module("patching")
    for name in set(sys.modules) - before:
        if (BUILD / f"{name}.py").exists():
            del sys.modules[name]


def patch(old: dict[str, str], new: dict[str, str]) -> str:
    text = "What it is for.\n\n"
    for name in old:
        lines = old[name].splitlines(keepends=True), new[name].splitlines(keepends=True)
        text += f"diff {name} {name}\n" + "".join(difflib.unified_diff(*lines, name, name))
    return text


def test_what_difflib_made_is_applied(patching: ModuleType, tmp_path: Path) -> None:
    given = random.Random(1)
    for number in range(50):
        old = [f"line {given.randrange(9)}\n" for _ in range(given.randrange(1, 60))]
        new = list(old)
        for _ in range(given.randrange(1, 6)):
            at = given.randrange(len(new) + 1)
            new[at : at + given.randrange(3)] = [f"-- {given.random()}\n"] * given.randrange(3)
        new.append("the end\n")
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "file").write_text("".join(old))
        file = folder / "a.patch"
        file.write_text(patch({"file": "".join(old)}, {"file": "".join(new)}))
        patching.apply(file, folder)
        assert (folder / "file").read_text() == "".join(new)


def test_nothing_is_changed_if_one_file_is_another(patching: ModuleType, tmp_path: Path) -> None:
    old = {"a": "1\n2\n3\n", "b": "x\ny\n"}
    file = tmp_path / "a.patch"
    file.write_text(patch(old, {"a": "1\n2\n4\n", "b": "x\nz\n"}))
    (tmp_path / "a").write_text(old["a"])
    (tmp_path / "b").write_text("x\nyy\n")
    with pytest.raises(importlib.import_module("common").Stop, match="another version of b"):
        patching.apply(file, tmp_path)
    (tmp_path / "b").unlink()
    with pytest.raises(importlib.import_module("common").Stop, match="another version of b"):
        patching.apply(file, tmp_path)
    assert (tmp_path / "a").read_text() == old["a"]
