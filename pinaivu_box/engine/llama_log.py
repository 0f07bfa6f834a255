"""What llama.cpp logs: its last error for our messages, and the memory that it has taken.

Its interface does not say how much it has on each device; its log does, in lines such as
"CUDA0 model buffer size = 138.13 MiB".  Warnings are forwarded to standard error.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterator
from typing import Literal

import llama_cpp.llama_cpp as llama

from pinaivu_box.engine.messages import CPU, DeviceMemory, OutOfMemory

_INFO, _WARNING, _ERROR, _CONTINUED = 2, 3, 4, 5  # ggml_log_level; lower levels are left out
_LOAD_FAILED = "failed to load model"
_Part = Literal["weights", "cache", "compute"]
_KINDS = "model|KV|RS|DSV4 \\S+ state|output|compute|LoRA"
_BUFFER = re.compile(
    rf"(?P<name>Meta\([^)]*\)|\S+)\s+(?P<kind>{_KINDS}) buffer size =\s*(?P<mib>[0-9.]+) MiB"
)
_PARTS: dict[str, _Part] = {
    "model": "weights", "LoRA": "weights", "KV": "cache", "RS": "cache", "output": "compute",
    "compute": "compute",
}  # fmt: skip
_CACHE_SIZE = re.compile(r": size =\s*(?P<mib>[0-9.]+) MiB \(")
_ALLOCATION = re.compile(r"failed to allocate (?P<name>\S+) buffer of size (?P<bytes>[0-9]+)")
_TENSOR_TYPE = re.compile(r"llama_model_loader: - type\s+(?P<type>\S+):\s+[0-9]+ tensors")
_NO_BUFFER = re.compile(r"unable to allocate (?P<name>\S+) buffer")
# What the error says that ends a failed allocation.
_PURPOSES: tuple[tuple[str, _Part], ...] = (
    ("unable to allocate", "weights"),
    ("kv cache", "cache"),
    ("rs cache", "cache"),
    ("compute", "compute"),
)
# llama.cpp's device for splits by tensors, which has all others behind it: what each of them has.
_META = "Meta("
_kept_alive: list[object] = []  # C holds the callback for the life of the process


class LlamaLog:
    """`last` is llama.cpp's last error, `shortage` the buffer that it could not allocate,
    `tensor_types` are those of the last model's weights, as ggml names them."""

    def __init__(self) -> None:
        self.last = ""
        self.shortage: OutOfMemory | None = None
        self.tensor_types: set[str] = set()
        self.cache_size = 0  # bytes; also of a cache that was only simulated
        self._taken: dict[tuple[str, _Part], int] = defaultdict(int)
        self._level = 0

    def __call__(self, level: int, text: bytes, _user_data: object) -> None:
        if level != _CONTINUED:  # else it goes on with the line before
            self._level = level
        if self._level < _INFO:
            return
        line = text.decode(errors="replace").strip()
        if self._level == _INFO:
            self._note_memory(line)
            return
        # The line that ends a failed load does not give the reason, which is in the line before.
        if self._level == _ERROR and line and not (self.last and line.endswith(_LOAD_FAILED)):
            self.last = line
            self._note_shortage(line)
        os.write(2, text)

    def memory(self, devices: list[str]) -> list[DeviceMemory]:
        """What was taken so far on each of these devices and on the CPU, in this order.  Buffers
        that a GPU's backend has in the machine's memory are the CPU's."""
        sums: dict[str, dict[_Part, int]] = {name: defaultdict(int) for name in [*devices, CPU]}
        for (buffer, part), size in self._taken.items():
            for owner in _owners(buffer, devices):
                sums[owner][part] += size
        memory = [
            DeviceMemory(name, parts["weights"], parts["cache"], parts["compute"])
            for name, parts in sums.items()
        ]
        return [each for each in memory if each.total]

    def _note_memory(self, line: str) -> None:
        if (found := _TENSOR_TYPE.search(line)) is not None:
            self.tensor_types.add(found["type"])
        elif (found := _BUFFER.search(line)) is not None:
            part = _PARTS.get(found["kind"], "cache")
            self._taken[found["name"], part] += _bytes(found["mib"])
        elif (found := _CACHE_SIZE.search(line)) is not None:
            self.cache_size += _bytes(found["mib"])

    def _note_shortage(self, line: str) -> None:
        if (found := _ALLOCATION.search(line)) is not None:
            self.shortage = OutOfMemory(_device_of(found["name"]), int(found["bytes"]))
        elif self.shortage is None and (found := _NO_BUFFER.search(line)) is not None:
            self.shortage = OutOfMemory(_device_of(found["name"]))
        if self.shortage is None:
            return
        for words, part in _PURPOSES:
            if words in line and not self.shortage.purpose:
                self.shortage = OutOfMemory(self.shortage.device, self.shortage.wanted, part)


def capture_log() -> LlamaLog:
    """The log of this process from now on."""
    log = LlamaLog()
    callback = llama.llama_log_callback(log)
    _kept_alive.append(callback)
    llama.llama_log_set(callback, None)
    return log


def _bytes(mib: str) -> int:
    return round(float(mib) * 1024 * 1024)


def _owners(buffer: str, devices: list[str]) -> Iterator[str]:
    """The devices in whose memory such a buffer is."""
    if buffer.startswith(_META):
        yield from devices
    else:
        yield buffer if buffer in devices else CPU


def _device_of(buffer: str) -> str:
    return CPU if buffer.startswith(CPU) else buffer
