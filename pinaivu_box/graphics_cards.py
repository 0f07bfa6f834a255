"""The graphics cards that the kernel sees, whether or not anything here can use them."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pinaivu_box.appended import program_has_payload

NVIDIA, AMD, INTEL = "NVIDIA", "AMD", "Intel"
_VENDORS = {"0x10de": NVIDIA, "0x1002": AMD, "0x8086": INTEL}  # others cannot compute
_DISPLAY = "0x03"  # the beginning of a PCI class
_BACKENDS_VARIABLE = "PINAIVU_BACKENDS"  # see `engine.backends`


@dataclass(frozen=True)
class GraphicsCard:
    """`pci_id` is its address, `model` the maker's number of it ("10de:2504")."""

    vendor: str
    pci_id: str
    model: str

    def __str__(self) -> str:
        return f"{self.vendor} ({self.model})"


def graphics_cards(root: Path = Path("/")) -> list[GraphicsCard]:
    """Those of vendors for whose cards there are backends, in the order of their addresses."""
    found = []
    for device in sorted((root / "sys/bus/pci/devices").glob("*")):
        vendor = _text(device / "vendor")
        if vendor in _VENDORS and _text(device / "class").startswith(_DISPLAY):
            model = f"{vendor[2:]}:{_text(device / 'device')[2:]}"
            found.append(GraphicsCard(_VENDORS[vendor], device.name, model))
    return found


def may_have_gpus(environ: Mapping[str, str], root: Path = Path("/")) -> bool:
    """Whether an engine child may find a GPU: starting one takes a second."""
    if sys.platform != "linux" or environ.get(_BACKENDS_VARIABLE) or graphics_cards(root):
        return True
    if program_has_payload():  # who has taken that one wants a GPU to be found
        return True
    # Of containers and of systems on a chip, and of Linux inside Windows.
    return any(
        any(root.glob(pattern)) for pattern in ("dev/nvidiactl", "dev/dri/render*", "dev/dxg")
    )


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
