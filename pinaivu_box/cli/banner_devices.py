"""The devices in the banner of `pinaivu serve`."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from pinaivu_box.graphics_cards import graphics_cards
from pinaivu_box.text import megabytes

if TYPE_CHECKING:
    from pinaivu_box.devices import Device, DeviceMonitor

_SECONDS = 10.0  # the server does not wait longer for a driver


async def describe_devices(monitor: DeviceMonitor, seconds: float = _SECONDS) -> str:
    """What models run on.  A machine that may have GPUs asks a child, which goes on by itself if it
    takes long."""
    listing = asyncio.ensure_future(monitor.read())
    done, _ = await asyncio.wait({listing}, timeout=seconds)
    if not done:
        return "still being listed: 'pinaivu ps --devices' shows them"
    if gpus := [device for device in listing.result() if device.is_gpu]:
        return ", ".join(map(_described, gpus))
    cpu = next((device.description for device in listing.result()), "CPU")
    if monitor.failure or graphics_cards():
        return f"{cpu}; no GPU can be used: 'pinaivu doctor' says why"
    return f"{cpu} (no GPU)"


def _described(device: Device) -> str:
    name = device.status.name if device.status is not None else device.description
    return f"{device.name} {name}, {megabytes(device.total)}"
