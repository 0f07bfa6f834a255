"""What a box says of its devices."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from msgspec import Struct

from pinaivu_box.devices import Device
from pinaivu_box.engine.messages import CPU, DeviceKind
from pinaivu_box.gateway.engine_process import EngineProcess
from pinaivu_box.models import memory


class DeviceView(Struct, frozen=True):
    """Memory in bytes: `used` by engines of this box, `others` by other programs (null where that
    is not known); `free` is that of now if it is `measured`, else that of when the devices were
    listed.  `utilisation` in percent of the time, `temperature` in degrees Celsius, `power` in
    watts."""

    name: str
    description: str
    kind: DeviceKind
    pci_id: str
    total: int
    free: int
    measured: bool
    used: int
    others: int | None = None
    utilisation: int | None = None
    temperature: int | None = None
    power: float | None = None


def device_views(devices: Sequence[Device], engines: Collection[EngineProcess]) -> list[DeviceView]:
    return [_view(device, engines) for device in devices]


def _view(device: Device, engines: Collection[EngineProcess]) -> DeviceView:
    status = device.status
    used = sum(engine.memory_by_device.get(device.name, 0) for engine in engines)
    free, measured = device.free, device.measured
    if device.name == CPU and (available := memory.available()) is not None:
        free, measured = available, True
    return DeviceView(
        name=device.name,
        # NVML knows how a card is sold.
        description=(status.name if status is not None else "") or device.description,
        kind=device.kind,
        pci_id=device.pci_id,
        total=device.total,
        free=free,
        measured=measured,
        used=used,
        others=_others(device, {engine.pid for engine in engines}),
        utilisation=status.utilisation if status is not None else None,
        temperature=status.temperature if status is not None else None,
        power=status.power if status is not None else None,
    )


def _others(device: Device, own: Collection[int]) -> int | None:
    """Bytes of processes that are not ours."""
    if device.status is None:
        return None
    processes = [process for process in device.status.processes if process.pid not in own]
    return sum(process.memory or 0 for process in processes)
