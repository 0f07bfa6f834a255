"""What NVIDIA's management library (NVML) says of the GPUs: memory, load, temperature, power and
the processes on them.  Without its library or a driver there is nothing to say, at once."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

from msgspec import Struct


class GpuProcess(Struct, frozen=True):
    """A process on a GPU; its memory in bytes, None where the driver does not tell it."""

    pid: int
    memory: int | None


class GpuStatus(Struct, frozen=True):
    """`utilisation` in percent of the time, temperature in degrees Celsius, power in watts; None
    where the GPU does not tell it."""

    name: str
    total: int
    free: int
    uuid: str = ""
    pci_id: str = ""
    utilisation: int | None = None
    temperature: int | None = None
    power: float | None = None
    processes: tuple[GpuProcess, ...] = ()


class Nvml:
    """Loads the library at the first use, and not again if that fails: `why_not` then says why.
    Calls block for milliseconds; any thread may make them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._library: Any = None
        self.why_not = ""
        self.driver = ""
        self.cuda = ""  # the newest CUDA version that the driver supports

    def gpus(self) -> list[GpuStatus]:
        """Every GPU of the machine, also those that CUDA_VISIBLE_DEVICES hides."""
        with self._lock:
            if self._library is None and not self.why_not:
                self._load()
            if self._library is None:
                return []
            nvml = self._library
            count = self._ask(nvml.nvmlDeviceGetCount) or 0
            read = [self._ask(partial(self._read, number)) for number in range(count)]
            return [gpu for gpu in read if gpu is not None]

    def close(self) -> None:
        with self._lock:
            if self._library is not None:
                self._ask(self._library.nvmlShutdown)
                self._library = None

    def _load(self) -> None:
        try:
            import pynvml  # a large module, which few need

            pynvml.nvmlInit()
        except ImportError:
            self.why_not = "the package nvidia-ml-py is not installed"
            return
        except pynvml.NVMLError as error:
            self.why_not = str(error)
            return
        self._library = pynvml
        self.driver = _text(self._ask(pynvml.nvmlSystemGetDriverVersion) or "")
        version = self._ask(pynvml.nvmlSystemGetCudaDriverVersion_v2) or 0
        self.cuda = f"{version // 1000}.{version % 1000 // 10}" if version else ""

    def _ask(self, question: Callable[[], Any]) -> Any:
        """The answer, None if this GPU or driver has none."""
        try:
            return question()
        except self._library.NVMLError:
            return None

    def _read(self, number: int) -> GpuStatus:
        nvml = self._library
        gpu = nvml.nvmlDeviceGetHandleByIndex(number)
        memory = nvml.nvmlDeviceGetMemoryInfo(gpu)
        pci = self._ask(partial(nvml.nvmlDeviceGetPciInfo, gpu))
        rates = self._ask(partial(nvml.nvmlDeviceGetUtilizationRates, gpu))
        milliwatts = self._ask(partial(nvml.nvmlDeviceGetPowerUsage, gpu))
        sensor = nvml.NVML_TEMPERATURE_GPU
        return GpuStatus(
            name=_text(nvml.nvmlDeviceGetName(gpu)),
            total=int(memory.total),
            free=int(memory.free),
            uuid=_text(self._ask(partial(nvml.nvmlDeviceGetUUID, gpu)) or ""),
            pci_id="" if pci is None else pci_id(_text(pci.busId)),
            utilisation=None if rates is None else int(rates.gpu),
            temperature=self._ask(partial(nvml.nvmlDeviceGetTemperature, gpu, sensor)),
            power=None if milliwatts is None else milliwatts / 1000,
            processes=self._processes(gpu),
        )

    def _processes(self, gpu: Any) -> tuple[GpuProcess, ...]:
        nvml = self._library
        found: dict[int, int | None] = {}
        for read in (
            nvml.nvmlDeviceGetComputeRunningProcesses,
            nvml.nvmlDeviceGetGraphicsRunningProcesses,
        ):
            for process in self._ask(partial(read, gpu)) or ():
                found.setdefault(int(process.pid), process.usedGpuMemory)
        return tuple(GpuProcess(pid, memory) for pid, memory in found.items())


def pci_id(text: str) -> str:
    """An address as NVML writes it ("00000000:C1:00.0") in the way of ggml and of Linux
    ("0000:c1:00.0")."""
    domain, _, rest = text.lower().partition(":")
    return f"{domain[-4:].rjust(4, '0')}:{rest}" if rest else ""


def _text(value: str | bytes) -> str:
    return value if isinstance(value, str) else value.decode(errors="replace")
