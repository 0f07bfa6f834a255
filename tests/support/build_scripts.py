"""The modules of build/, which is no package."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from tests.support.paths import ROOT

BUILD = ROOT / "build"


@contextmanager
def build_module(name: str) -> Iterator[ModuleType]:
    """One of them, while the body runs; then it and what it imported are forgotten."""
    before = set(sys.modules)
    sys.path.insert(0, str(BUILD))
    try:
        yield importlib.import_module(name)
    finally:
        sys.path.remove(str(BUILD))
        for imported in set(sys.modules) - before:
            if (BUILD / f"{imported}.py").exists():
                del sys.modules[imported]
