"""The devices that ggml sees in this process, and which of them a model gets."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path

import llama_cpp.llama_cpp as llama

from pinaivu_box.engine import backends, llama_blas
from pinaivu_box.engine.messages import CPU, DeviceKind, ListedDevice, LoadModel
from pinaivu_box.errors import BoxError

_KINDS: tuple[DeviceKind, ...] = ("cpu", "gpu", "igpu", "accel")  # ggml_backend_dev_type
_SPLIT_MODES = {"none": 0, "layer": 1, "tensor": 3}  # llama_split_mode
_TYPES = {
    "f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q5_0": 6, "q5_1": 7, "q8_0": 8, "iq4_nl": 20,
    "bf16": 30,
}  # fmt: skip


class _Properties(ctypes.Structure):
    """ggml_backend_dev_props"""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("description", ctypes.c_char_p),
        ("memory_free", ctypes.c_size_t),
        ("memory_total", ctypes.c_size_t),
        ("type", ctypes.c_int),
        ("device_id", ctypes.c_char_p),
        ("capabilities", ctypes.c_bool * 8),
    )


_LIBRARIES = Path(llama.__file__).parent / "lib"


def load_backends(cpu_variant: str = "") -> tuple[backends.BackendLibrary, ...]:
    """Load the backends of this process; see `backends.load`.  Raises BoxError."""
    found = backends.load(llama._lib, _LIBRARIES, cpu_variant)
    llama.llama_backend_init()
    return found


def cpu_library() -> backends.CpuLibrary:
    """ggml's library for the CPU that this process has loaded."""
    return backends.cpu_library(_LIBRARIES)


def listed() -> list[ListedDevice]:
    """Every device, in ggml's order."""
    return [_read(pointer) for pointer in _pointers()]


def _pointers() -> list[int]:
    lib = llama._lib
    lib.ggml_backend_dev_count.restype = ctypes.c_size_t
    lib.ggml_backend_dev_get.argtypes = (ctypes.c_size_t,)
    lib.ggml_backend_dev_get.restype = ctypes.c_void_p
    return [lib.ggml_backend_dev_get(number) for number in range(lib.ggml_backend_dev_count())]


def _read(pointer: int) -> ListedDevice:
    properties = _Properties()
    read = llama._lib.ggml_backend_dev_get_props
    read.argtypes, read.restype = (ctypes.c_void_p, ctypes.POINTER(_Properties)), None
    read(pointer, ctypes.byref(properties))
    known = 0 <= properties.type < len(_KINDS)
    return ListedDevice(
        name=_text(properties.name),
        description=_text(properties.description),
        kind=_KINDS[properties.type] if known else "accel",
        pci_id=_text(properties.device_id),
        total=properties.memory_total,
        free=properties.memory_free,
    )


def _text(value: bytes | None) -> str:
    return (value or b"").decode(errors="replace").strip()


class DeviceChoice:
    """The devices of a model, from the settings in LoadModel.  Raises BoxError where these cannot
    be followed."""

    def __init__(self, load: LoadModel) -> None:
        all_devices: dict[str, ListedDevice] = {}
        pointers: dict[str, int] = {}
        for device, pointer in zip(listed(), _pointers(), strict=True):  # a name may come twice
            all_devices.setdefault(device.name, device)
            pointers.setdefault(device.name, pointer)
        self._load = load
        self._names = _gpus_of(load, all_devices)
        self._check()
        self.without_blas = llama_blas.has_stand_in(load_backends())
        if self.without_blas:
            self._names = llama_blas.allowed(load, self._names)
        self._pointers = [pointers[name] for name in self._names]
        # llama.cpp reads them while it loads.
        self._devices = (ctypes.c_void_p * (len(self._names) + 1))(*self._pointers, None)
        self._proportions = (ctypes.c_float * max(1, llama.llama_max_devices()))(*load.tensor_split)
        self._descriptions = {name: device.description for name, device in all_devices.items()}
        self._kinds = {name: device.kind for name, device in all_devices.items()}

    @property
    def gpus(self) -> list[str]:
        """Their names, in the order in which the layers are divided."""
        if self._load.split == "none" and self._names:
            return [self._names[self._main]]
        return self._names

    @property
    def main(self) -> int | None:
        """ggml's pointer to the GPU that has what is not divided; None for the CPU."""
        return self._pointers[self._main] if self._names else None

    @property
    def for_images(self) -> int | None:
        """`main`, or None if that cannot compute what encoders of images have."""
        unfit = self.without_blas and self._names and llama_blas.is_cuda(self._names[self._main])
        return None if unfit else self.main

    @property
    def only_plain_cpu(self) -> bool:
        """Whether ggml's own kernels for the CPU compute all of it."""
        return not self._names and "accel" not in self._kinds.values()

    def described(self, names: Sequence[str]) -> str:
        """What computes on these, by the makers' names."""
        # Libraries for the CPU, such as BLAS, are devices of their own.
        cpu = [name for name, kind in self._kinds.items() if kind in ("cpu", "accel")]
        wanted = [each for name in names for each in (cpu if name == CPU else [name])]
        return ", ".join(self._descriptions.get(name, name) for name in wanted)

    def apply(self, params: llama.llama_model_params) -> None:
        """Set what loading a model depends on."""
        params.devices = ctypes.cast(self._devices, ctypes.c_void_p)
        params.n_gpu_layers = self._load.gpu_layers if self._names else 0
        params.split_mode = _SPLIT_MODES[self._load.split if self._names else "layer"]
        params.main_gpu = self._main
        if self._load.tensor_split:
            params.tensor_split = self._proportions

    @property
    def _main(self) -> int:
        name = self._load.main_device
        return self._names.index(name) if name in self._names else 0

    def _check(self) -> None:
        load, names = self._load, self._names
        if load.main_device and load.main_device not in [*names, CPU]:
            listing = ", ".join(names) or CPU
            raise BoxError(f"main_device is {load.main_device}, and the model's are {listing}")
        if load.split == "tensor" and len(names) < 2:
            raise BoxError('split = "tensor" needs two GPUs at least: use "layer"')
        if not load.tensor_split or load.split == "none":
            return
        if len(load.tensor_split) != len(names):
            raise BoxError(
                f"tensor_split has {len(load.tensor_split)} numbers, and the model has "
                f"{len(names)} GPUs ({', '.join(names) or 'none'}): give one for each"
            )
        if sum(load.tensor_split) <= 0:
            raise BoxError("tensor_split has no number above 0")


def _gpus_of(load: LoadModel, devices: dict[str, ListedDevice]) -> list[str]:
    """The names of those that get layers, none for the CPU alone."""
    if unknown := [name for name in load.devices if name not in devices]:
        raise BoxError(
            f"there is no device {unknown[0]} here: there are {', '.join(devices)} ('pinaivu ps "
            "--devices' lists them)"
        )
    if load.gpu_layers == 0:
        return []
    if load.devices:
        return [name for name in load.devices if devices[name].kind in ("gpu", "igpu")]
    gpus = [name for name, device in devices.items() if device.kind == "gpu"]
    # As llama.cpp: an integrated GPU takes the machine's memory, so it is the second choice.
    return gpus or [name for name, device in devices.items() if device.kind == "igpu"]


def cache_type(load: LoadModel) -> int:
    """The ggml_type of its KV cache."""
    return _TYPES[load.kv_type]
