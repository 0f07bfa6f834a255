"""Projectors: the files with which models see images (`mmproj`), and which of them is whose."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from pinaivu_box.models.folder_scan import SUFFIX
from pinaivu_box.models.splits import stem_of
from pinaivu_box.text import END

NONE = "none"  # in the configuration: no projector, whatever lies beside the model
MARK = "mmproj"
_QUANTISATION = re.compile(
    r"[-_.]?(?:(?:i?q|tq)[0-9][a-z0-9_]*|bf16|f16|f32|fp16|fp32|mxfp4)(?![\s\S])"
)
_KINDS = ("f16", "bf16", "q8_0")  # the first that there is
_GENERIC = ("", "model")  # mmproj-F16.gguf, mmproj-model-f16.gguf


def name_for(model: Path) -> str:
    """The name of the projector of that model, of which it is the first file."""
    return f"{MARK}-{stem_of(model.name)}{SUFFIX}"


def choose(names: Sequence[str], model: str) -> str:
    """The GGUF file of a repository with which that model of it sees images; "" if there is none.

    Those in the model's folder are preferred, then half precision, as projectors are small.
    """
    found = [
        name
        for name in names
        if name.lower().endswith(".gguf") and MARK in name.rpartition("/")[2].lower()
    ]

    def rank(name: str) -> tuple[bool, int, str]:
        kinds = [number for number, kind in enumerate(_KINDS) if _is_kind(name, kind)]
        elsewhere = name.rpartition("/")[0] != model.rpartition("/")[0]
        return elsewhere, min(kinds, default=len(_KINDS)), name

    return min(found, key=rank, default="")


def _is_kind(name: str, kind: str) -> bool:
    return re.search(rf"(?:^|[^a-z0-9]){kind}(?:[^a-z0-9]|{END})", name.lower()) is not None


class Projectors:
    """Finds projectors beside models; remembers what is in a folder for as long as it lives."""

    def __init__(self) -> None:
        self._folders: dict[Path, list[str]] = {}

    def beside(self, model: Path) -> list[Path]:
        """Those in the model's folder that its name says are its own: `mmproj` and the same name,
        quantisation aside, or no name where the folder has no other model."""
        names = self._names(model.parent)
        own = _name(model.name)
        models = {_name(name) for name in names if MARK not in name.lower()}
        found = [name for name in names if MARK in name.lower() and _of(name) == own]
        if models == {own}:
            found += [n for n in names if MARK in n.lower() and _of(n) in _GENERIC]
        return [model.with_name(name) for name in found]

    def _names(self, folder: Path) -> Sequence[str]:
        if folder not in self._folders:
            try:
                names = sorted((path.name for path in folder.iterdir()), key=os.fsencode)
            except OSError:
                names = []
            self._folders[folder] = [name for name in names if name.lower().endswith(SUFFIX)]
        return self._folders[folder]


def _name(file: str) -> str:
    """What the file is called without quantisation and the number of the part."""
    return _QUANTISATION.sub("", stem_of(file).lower())


def _of(projector: str) -> str:
    """The name of the model that a projector names."""
    return _QUANTISATION.sub("", _name(projector.lower().replace(MARK, "")).strip("-_."))
