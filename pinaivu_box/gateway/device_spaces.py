"""What can be had on each device now: what is measured there, less what engines that are being
loaded have not taken yet and what stays free for the rest of the machine."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Protocol

from pinaivu_box.devices import Device
from pinaivu_box.engine.messages import CPU
from pinaivu_box.gateway.layouts import Space
from pinaivu_box.gateway.placement_plan import RunningEngine
from pinaivu_box.models import memory

RESERVE_BYTES = 256 * 1024 * 1024  # left to the rest of the machine
# On a GPU: what a process takes there before its first buffer, and some for other programs.
_MAX_GPU_RESERVE_BYTES, _GPU_RESERVE = 768 * 1024 * 1024, 16  # of its memory, one part in so many
_UNKNOWN = 2**62  # as much as anybody wants


class DeviceReader(Protocol):
    """See `devices.DeviceMonitor`."""

    async def read(self, *, anew: bool = False) -> Sequence[Device]: ...


def gpu_reserve(total: int) -> int:
    return min(_MAX_GPU_RESERVE_BYTES, total // _GPU_RESERVE)


def spaces_of(
    devices: Sequence[Device],
    engines: Collection[RunningEngine],
    missing: Callable[[str], int],
    resident: Callable[[RunningEngine], int],
) -> list[Space]:
    """`missing` bytes of a device are thought not to be there; `resident` is what an engine that is
    being loaded has of the machine's memory already."""
    cpu, gpus = _cpu(engines, resident), list[Space]()
    seen = {""}
    for device in devices:
        if not device.is_gpu or (device.pci_id and device.pci_id in seen):
            continue  # the second may be the same card, as another backend sees it
        seen.add(device.pci_id)
        space = _gpu(device, engines)
        if device.kind == "igpu":
            space = replace(space, free=min(space.free, cpu.free), integrated=True)
        gpus.append(space)
    return [replace(space, free=space.free - missing(space.device)) for space in (*gpus, cpu)]


def _cpu(engines: Collection[RunningEngine], resident: Callable[[RunningEngine], int]) -> Space:
    available, total = memory.available(), memory.total()
    if available is None:
        return Space(CPU, _UNKNOWN, _UNKNOWN, gpu=False)
    coming = sum(
        max(0, engine.memory.get(CPU, 0) - resident(engine))
        for engine in engines
        if engine.starting
    )
    return Space(CPU, available - RESERVE_BYTES - coming, total or _UNKNOWN, gpu=False)


def _gpu(device: Device, engines: Collection[RunningEngine]) -> Space:
    ours = sum(engine.memory.get(device.name, 0) for engine in engines)
    coming = sum(engine.memory.get(device.name, 0) for engine in engines if engine.starting)
    # A device that nobody measures has what it had when it was listed: before any engine of ours.
    free = device.free - (coming if device.measured else ours)
    return Space(
        device.name, min(free, device.total - ours) - gpu_reserve(device.total), device.total
    )
