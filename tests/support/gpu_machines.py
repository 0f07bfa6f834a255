"""Machines with graphics cards that exist only as files below a folder."""

from __future__ import annotations

from pathlib import Path

NVIDIA, AMD, INTEL, VIRTUAL = "0x10de", "0x1002", "0x8086", "0x1234"
_DRIVER = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  {}  Tue Mar  5 22:23:56 UTC 2024\n"


def machine(root: Path, *vendors: str, driver: str = "", nodes: bool = True) -> Path:
    """A root with these cards, and NVIDIA's driver of that version."""
    for number, vendor in enumerate(vendors, 1):
        folder = root / f"sys/bus/pci/devices/0000:0{number}:00.0"
        folder.mkdir(parents=True)
        for name, text in {"vendor": vendor, "class": "0x030200", "device": "0x2504"}.items():
            (folder / name).write_text(f"{text}\n")
    if driver:
        (root / "proc/driver/nvidia").mkdir(parents=True)
        (root / "proc/driver/nvidia/version").write_text(_DRIVER.format(driver))
    if driver and nodes:
        (root / "dev").mkdir()
        (root / "dev/nvidia0").touch()
    return root
