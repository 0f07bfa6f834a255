"""Checks of the GPUs: which cards there are, and for each that models cannot use, why not and what
to do."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from pinaivu_box import text
from pinaivu_box.devices import Device, DeviceMonitor
from pinaivu_box.doctor.check import Check, State
from pinaivu_box.engine.messages import GgmlBackend
from pinaivu_box.graphics_cards import AMD, INTEL, NVIDIA, graphics_cards, may_have_gpus
from pinaivu_box.text import megabytes

_NAME = "GPU"
_CUDA, _VULKAN = "cuda", "vulkan"
_CUDA_VERSION = (13, 0)  # that our backend is compiled for
_DRIVER = 580  # the first that has it
_GET_CUBLAS = (
    "get cuBLAS 13: from the release, by 'pip install nvidia-cublas==13.*', or with the CUDA "
    "toolkit (docs/devices.md)"
)
_ON_CPU = "models run on the CPU"
_USE_VULKAN = "to use it, take the build with Vulkan ('build/binary --vulkan', docs/devices.md)"


@dataclass(frozen=True)
class Seen:
    """What an engine and NVML see.  `driver` is NVIDIA's, `cuda` the newest CUDA version that it
    supports; both are empty where NVML cannot be asked."""

    devices: tuple[Device, ...] = ()
    backends: tuple[GgmlBackend, ...] = ()
    failure: str = ""
    driver: str = ""
    cuda: str = ""

    def backend(self, name: str) -> GgmlBackend | None:
        return next((each for each in self.backends if each.name == name), None)


def gpus(root: Path = Path("/"), environ: Mapping[str, str] = os.environ) -> Iterator[Check]:
    """Check the GPUs of this machine."""
    if not (may_have_gpus(environ, root) or _driver_file(root)):
        yield Check(_NAME, "ok", f"no GPU: {_ON_CPU}")
        return
    yield from judge(root, asyncio.run(look()))


async def look() -> Seen:
    """What an engine sees; a child lists the devices."""
    monitor = DeviceMonitor()
    devices = await monitor.list_anew()
    nvml = monitor.nvml
    await asyncio.to_thread(nvml.gpus)
    seen = Seen(tuple(devices), tuple(monitor.backends), monitor.failure, nvml.driver, nvml.cuda)
    monitor.close()
    return seen


def judge(root: Path, seen: Seen) -> Iterator[Check]:
    """The checks that follow from what the kernel shows below `root` and from what was seen."""
    usable = [device for device in seen.devices if device.is_gpu]
    for device in usable:
        yield _usable(device, seen)
    if seen.failure:
        finding = f"the devices cannot be listed: {seen.failure}"
        yield Check(_NAME, "warning", finding, "update the GPU's driver, or report it")
        return
    known = {device.pci_id for device in usable}
    named = {device.name.rstrip("0123456789").lower() for device in usable}
    cards = [card for card in graphics_cards(root) if card.pci_id not in known]
    # A device that does not tell its address is one of the cards of its backend.
    nvidia = [card for card in cards if card.vendor == NVIDIA and _CUDA not in named]
    if nvidia or (_driver_file(root) and not named):
        yield _nvidia(root, seen, str(nvidia[0]) if nvidia else "an NVIDIA GPU")
    for card in cards:
        if card.vendor in (AMD, INTEL) and _VULKAN not in named:
            yield _other(str(card), card.vendor, seen)
    if not (usable or cards or _driver_file(root)):
        yield Check(_NAME, "ok", f"no GPU: {_ON_CPU}")


def _usable(device: Device, seen: Seen) -> Check:
    name = device.status.name if device.status is not None else device.description
    driver = f", driver {seen.driver}" if device.status is not None and seen.driver else ""
    finding = (
        f"{device.name}: {name}, {megabytes(device.free)} of {megabytes(device.total)} free{driver}"
    )
    backend = seen.backend(_CUDA)
    if device.name.startswith("CUDA") and backend is not None and backend.stand_ins:
        finding += "; without cuBLAS, so models in F16, BF16 or F32 run on the CPU"
        return Check(_NAME, "warning", finding, _GET_CUBLAS)
    return Check(_NAME, "ok", finding)


def _nvidia(root: Path, seen: Seen, card: str) -> Check:
    """Why an NVIDIA card is not used."""
    if not _driver_file(root) and not seen.driver:
        finding = f"there is {_a(card)} but no driver: {_ON_CPU}"
        return Check(_NAME, "warning", finding, f"install NVIDIA's driver, R{_DRIVER} or newer")
    if not list((root / "dev").glob("nvidia[0-9]*")) and not (root / "dev/dxg").exists():
        finding = f"there is an NVIDIA driver but no /dev/nvidia*: {_ON_CPU}"
        todo = "in a container, add the GPU (--gpus all); otherwise run 'nvidia-modprobe'"
        return Check(_NAME, "warning", finding, todo)
    if (why := _too_old(root, seen)) is not None:
        return Check(_NAME, "warning", f"{why}: {_ON_CPU}", f"update it to R{_DRIVER} or newer")
    backend = seen.backend(_CUDA)
    if backend is None:
        finding = f"there is {_a(card)}, and this build has no CUDA backend: {_ON_CPU}"
        todo = "use 'pinaivu-cuda', or run 'build/run --cuda' (docs/devices.md)"
        return Check(_NAME, "warning", finding, todo)
    if backend.missing.startswith("libcublas"):
        finding = f"the CUDA backend needs {backend.missing}, which is nowhere here: {_ON_CPU}"
        return Check(_NAME, "warning", finding, _GET_CUBLAS)
    if backend.missing.startswith("libcuda.") or not _has_libcuda(root):
        finding = f"there is an NVIDIA driver but no libcuda.so.1: {_ON_CPU}"
        return Check(_NAME, "warning", finding, "install the driver's CUDA library (libcuda1)")
    if backend.problem:
        finding = f"the CUDA backend cannot be loaded ({backend.problem}): {_ON_CPU}"
        return Check(_NAME, "warning", finding, "compile it anew: 'build/run --cuda'")
    finding = f"there is {_a(card)}, and CUDA shows no device: {_ON_CPU}"
    todo = "see whether CUDA_VISIBLE_DEVICES hides it; otherwise 'nvidia-smi' says what is wrong"
    return Check(_NAME, "warning", finding, todo)


def _other(card: str, vendor: str, seen: Seen) -> Check:
    """Why a card of another vendor is not used."""
    backend = seen.backend(_VULKAN)
    if backend is None:
        # Most of Intel's share the CPU's memory, and are not much faster.
        state: State = "ok" if vendor == INTEL else "warning"
        finding = f"there is {_a(card)}, and this build has no backend for it: {_ON_CPU}"
        return Check(_NAME, state, finding, _USE_VULKAN)
    if backend.missing:
        finding = f"the Vulkan backend needs {backend.missing}, which is nowhere here: {_ON_CPU}"
        return Check(_NAME, "warning", finding, "install the Vulkan loader (libvulkan1)")
    if backend.problem:
        finding = f"the Vulkan backend cannot be loaded ({backend.problem}): {_ON_CPU}"
        return Check(_NAME, "warning", finding, "compile it anew: 'build/binary --vulkan'")
    finding = f"there is {_a(card)}, and Vulkan shows no device: {_ON_CPU}"
    return Check(_NAME, "warning", finding, "install its Vulkan driver (mesa-vulkan-drivers)")


def _too_old(root: Path, seen: Seen) -> str | None:
    """Why the driver does not serve our backend, None if it does."""
    driver = seen.driver or _version(root)
    if seen.cuda:
        major, minor = (int(part) for part in seen.cuda.split("."))
        if (major, minor) >= _CUDA_VERSION:
            return None
        return f"NVIDIA's driver {driver} supports CUDA {seen.cuda}, and 13.0 is needed"
    release = text.number(driver.partition(".")[0])
    if release is not None and release < _DRIVER:
        return f"NVIDIA's driver {driver} is older than R{_DRIVER}"
    return None


def _a(card: str) -> str:
    return card if card.startswith("an ") else f"an {card} card"


def _driver_file(root: Path) -> str:
    try:
        return (root / "proc/driver/nvidia/version").read_text().partition("\n")[0]
    except OSError:
        return ""


def _version(root: Path) -> str:
    found = re.search(r"[0-9]+\.[0-9.]+", _driver_file(root))
    return found[0] if found else "unknown"


def _has_libcuda(root: Path) -> bool:
    """Read the list of the linker: loading the library would run the driver in this process."""
    try:
        listed = subprocess.run(
            [shutil.which("ldconfig") or "/sbin/ldconfig", "-r", str(root), "-p"],
            capture_output=True,
            text=True,
            check=False,
        ).stdout
    except OSError:
        return True  # unknown; the engine reports it
    return "libcuda.so.1 " in listed
