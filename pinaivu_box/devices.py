"""The devices of this machine: what ggml sees, joined with what NVML says of it.

An engine child lists them, since only children load the libraries of GPUs.  The list stays as it is
until it is made anew; memory and the rest of a GPU's state are read again when somebody looks.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path

from msgspec.structs import asdict, replace

from pinaivu_box import engine_query
from pinaivu_box.engine import messages
from pinaivu_box.engine_query import QueryFailed
from pinaivu_box.graphics_cards import may_have_gpus
from pinaivu_box.nvml import GpuStatus, Nvml

log = logging.getLogger("pinaivu.devices")

_LIST_SECONDS = 60.0  # the first use of a GPU's driver can take long
_MAX_AGE_SECONDS = 1.0
_READ_SECONDS = 5.0
_AMD_MEMORY = ("mem_info_vram_total", "mem_info_vram_used")


class Device(messages.ListedDevice, frozen=True):
    """`status` is NVML's, None for what NVML does not know.  `free` is that of now if it is
    `measured`, else that of when the devices were listed."""

    status: GpuStatus | None = None
    measured: bool = False

    @property
    def is_gpu(self) -> bool:
        """Whether layers of a model can be put on it."""
        return self.kind in ("gpu", "igpu")


class DeviceMonitor:
    """The list of devices, and their state.  Empty until somebody reads them."""

    def __init__(self, nvml: Nvml | None = None, root: Path = Path("/")) -> None:
        self.nvml, self._root = nvml or Nvml(), root
        self._listed: list[messages.ListedDevice] = []
        self._read_at = -_MAX_AGE_SECONDS
        self._reading = asyncio.Lock()
        self._joining: asyncio.Future[list[Device]] | None = None
        self.listed = False  # whether somebody has asked for them
        self.devices: list[Device] = []  # as they were read last
        self.backends: list[messages.GgmlBackend] = []  # of ggml, beside the CPU's
        self.failure = ""  # why there is no list, as the end of a sentence

    @property
    def gpus(self) -> list[Device]:
        return [device for device in self.devices if device.is_gpu]

    async def list_anew(self, seconds: float = _LIST_SECONDS) -> list[Device]:
        """List the devices in a child, and read their state.  If that fails, there is `failure` and
        no device, and the box goes on."""
        async with self._reading:
            await self._list(seconds)
        return await self.read()

    async def _list(self, seconds: float) -> None:
        try:
            answer = await engine_query.ask(messages.ListDevices(), messages.Devices, seconds)
            self._listed, self.backends, self.failure = answer.devices, answer.backends, ""
        except (QueryFailed, OSError) as error:
            why = error.message if isinstance(error, QueryFailed) else str(error)
            self._listed, self.failure = [], why
            log.warning("the devices could not be listed: %s", why)
        self.listed = True  # which it is not if this was cancelled
        self._read_at = -_MAX_AGE_SECONDS

    async def read(self, *, anew: bool = False) -> list[Device]:
        """The devices with their state, which is at most a second old; that of now if it is read
        `anew`.  The first time they are listed, by a child if this machine may have a GPU."""
        async with self._reading:
            if not self.listed and may_have_gpus(os.environ, self._root):
                await self._list(_LIST_SECONDS)
            elif not self.listed:
                self.listed, self._listed = True, [_cpu(self._root)]
            if anew or time.monotonic() - self._read_at > _MAX_AGE_SECONDS:
                if self._joining is None or self._joining.done():
                    self._joining = asyncio.ensure_future(asyncio.to_thread(self._join))
                # A driver that hangs must not stop the models that are on the CPU.
                done, _ = await asyncio.wait({self._joining}, timeout=_READ_SECONDS)
                if done:
                    self.devices = self._joining.result()
                self._read_at = time.monotonic()
        return self.devices

    def close(self) -> None:
        self.nvml.close()

    def _join(self) -> list[Device]:
        wants_nvml = any(device.name.startswith("CUDA") or device.pci_id for device in self._listed)
        gpus = self.nvml.gpus() if wants_nvml else []
        return [_with_state(device, gpus, self._root) for device in self._listed]


def _cpu(root: Path) -> messages.ListedDevice:
    """As ggml describes it."""
    name = "CPU"
    with contextlib.suppress(OSError):
        for line in (root / "proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return messages.ListedDevice(messages.CPU, name, "cpu", total=size, free=size)


def _with_state(device: messages.ListedDevice, gpus: Sequence[GpuStatus], root: Path) -> Device:
    status = next((gpu for gpu in gpus if device.pci_id and gpu.pci_id == device.pci_id), None)
    joined = Device(**asdict(device), status=status)
    if status is not None and device.kind == "gpu":
        unused = min(status.free, device.total or status.free)
        return replace(joined, free=unused, measured=True)
    if (free := _amd_free(device, root)) is not None:
        return replace(joined, free=free, measured=True)
    return joined


def _amd_free(device: messages.ListedDevice, root: Path) -> int | None:
    """Bytes that are free, as AMD's kernel driver says."""
    if not device.pci_id or device.kind != "gpu":
        return None
    folder = root / "sys/bus/pci/devices" / device.pci_id
    try:
        total, used = (int((folder / name).read_text()) for name in _AMD_MEMORY)
    except (OSError, ValueError):
        return None
    return max(0, total - used)
