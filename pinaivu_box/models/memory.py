"""The sizes of an engine's context, how much memory there is, and what a process has used."""

from __future__ import annotations

import contextlib
from pathlib import Path

from pinaivu_box.models.catalog import Model

_IMAGE_BYTES = 256 * 1024 * 1024  # of the buffers of a projector of an ordinary size
DEFAULT_CONTEXT = 8192
DEFAULT_KV_TOKENS = 16384


def context_of(model: Model, configured: int) -> int:
    """Most tokens of one sequence: configured for the model, for the box, or from the file."""
    if model.is_fake:
        return model.settings.context or configured or DEFAULT_CONTEXT
    usual = model.parameters.num_ctx or DEFAULT_CONTEXT
    return model.settings.context or configured or min(model.header.context_length, usual)


def kv_tokens_of(context: int, configured: int) -> int:
    """Cells of an engine's KV cache, shared by all its sequences."""
    return max(context, configured or DEFAULT_KV_TOKENS)


def projector_bytes(model: Model) -> int:
    """Bytes that its projector takes, and one image while it is looked at; about."""
    return 0 if model.projector is None else model.projector.size + _IMAGE_BYTES


def adapters_bytes(model: Model) -> int:
    """Bytes of its adapters and of its draft model's, which are loaded whole."""
    drafting = adapters_bytes(model.draft) if model.draft is not None else 0
    return sum(adapter.size for adapter in model.adapters) + drafting


def available() -> int | None:
    """Bytes that can be had without swapping; None where unknown."""
    return _bytes("/proc/meminfo", "MemAvailable")


def total() -> int | None:
    """Bytes of this machine; None where unknown."""
    return _bytes("/proc/meminfo", "MemTotal")


def resident(pid: int) -> int:
    """Bytes of physical memory that a process holds, 0 where unknown."""
    return _bytes(f"/proc/{pid}/status", "VmRSS") or 0


def _bytes(path: str, field: str) -> int | None:
    """N of the line `FIELD:   N kB` of a file in /proc, in bytes; None if there is none."""
    with contextlib.suppress(OSError):
        for line in Path(path).read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    return None


def cpu_ticks(pid: int) -> int | None:
    """Processor time that a process and the children that it has now have used, in the kernel's
    ticks; None where unknown.  It may get less: with a child goes what that has used."""
    ticks = _ticks(pid)
    if ticks is None:
        return None
    return ticks + sum(_ticks(child) or 0 for child in _children(pid))


def _children(pid: int) -> list[int]:
    children: list[int] = []
    with contextlib.suppress(OSError):  # it has ended, or this kernel does not list them
        for thread in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(OSError):
                children += map(int, (thread / "children").read_text().split())
    return children


def _ticks(pid: int) -> int | None:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return int(fields[11]) + int(fields[12])  # utime and stime of proc_pid_stat(5)
