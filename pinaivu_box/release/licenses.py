"""What this program consists of, and under which licences.

The executable has it as a file that was made of what was put into it (build/components.py).
Elsewhere it is what the installed packages say of themselves (`installed`).
"""

from __future__ import annotations

import gzip
from pathlib import Path

import msgspec

# In the executable only.
_PACKED = Path(__file__).parent / "components.json.gz"


class LicenseText(msgspec.Struct, frozen=True):
    """A text that comes with a component: its licence, or a notice."""

    name: str
    text: str


class ComponentPart(msgspec.Struct, frozen=True):
    """A library that was linked into a component."""

    name: str
    version: str
    license: str


class Component(msgspec.Struct, frozen=True):
    """`kind` is "program", "package" (of Python), "library" or "model"; `license` an SPDX
    expression, "" if nobody says; `source` what it was made of; `parts` are in it."""

    name: str
    version: str
    kind: str
    license: str
    texts: tuple[LicenseText, ...] = ()
    source: str = ""
    parts: tuple[ComponentPart, ...] = ()


def components() -> list[Component]:
    """All that is in this program, sorted by kind and name."""
    try:
        return unpack(_PACKED.read_bytes())
    except FileNotFoundError:
        from pinaivu_box.release.installed import installed

        return ordered(installed())


def pack(found: list[Component]) -> bytes:
    """The file for the executable: the same bytes for the same components."""
    return gzip.compress(msgspec.json.encode(ordered(found)), mtime=0)


def unpack(packed: bytes) -> list[Component]:
    return msgspec.json.decode(gzip.decompress(packed), type=list[Component])


def ordered(found: list[Component]) -> list[Component]:
    kinds = ("program", "package", "library", "model")
    return sorted(found, key=lambda one: (kinds.index(one.kind), one.name.lower()))
