"""Two fixes for iroh 1.2.0's Python bindings, which uniffi 0.31 generated.

**Copying.**  What is sent is copied byte by byte in Python (5 MB/s).  0.32 does what we do here.
Private names are replaced, so each is looked up first, and the result is tried.

**Freeing.**  iroh's own thread calls into Python to wake a coroutine, and does so while it holds
the lock of a connection.  If Python's garbage collector happens to run in that call and finds a
stream of the same connection, `__del__` frees it there, which takes the lock that the thread
already has: iroh is deadlocked, then our event loop at its next call, and peers lose their links to
us.  So nothing is freed in `__del__`; a thread of ours that holds no lock does it.
"""

from __future__ import annotations

import ctypes
import logging
import struct
import threading
from collections.abc import Callable
from importlib.metadata import version
from queue import SimpleQueue
from typing import Any

import iroh.iroh_ffi

KNOWN = "1.2.0"
log = logging.getLogger(__name__)

Free = Callable[[Any], None]
_garbage: SimpleQueue[tuple[Free, Any]] = SimpleQueue()  # `__del__` may put into it


def apply_fixes() -> None:
    """Apply both, once in each process."""
    fix_copying()
    for kind in vars(iroh.iroh_ffi).values():
        if isinstance(kind, type) and "__del__" in vars(kind):
            kind.__del__ = _deferred(vars(kind)["__del__"])  # type: ignore[attr-defined]
    threading.Thread(target=_free_forever, name="iroh-free", daemon=True).start()


def _deferred(free: Free) -> Free:
    def __del__(self: Any) -> None:  # noqa: N807
        _garbage.put((free, self))  # referenced again; Python calls `__del__` only once

    return __del__


def _free_forever() -> None:
    while True:
        free, instance = _garbage.get()
        try:
            free(instance)
        except Exception:
            log.exception("iroh could not free something")
        del instance  # not referenced until the next one comes


def fix_copying(ffi: Any = iroh.iroh_ffi, installed: str | None = None) -> bool:
    """Replace the copying; returns whether it is replaced.  `ffi` and `installed` are for tests."""
    converter = getattr(ffi, "_UniffiFfiConverterBytes", None)
    buffers = getattr(ffi, "_UniffiRustBuffer", None)
    lower = _fast_lower(buffers)
    known = (installed or version("iroh")) == KNOWN and hasattr(converter, "lower")
    if not known or not _works(buffers, lower):
        log.warning("iroh's bindings are not the version that is known: links will be slow")
        return False
    converter.lower = staticmethod(lower)  # type: ignore[union-attr]
    return True


def _fast_lower(buffers: Any) -> Any:
    def lower(value: bytes) -> Any:
        """Lay out bytes as uniffi does: a big-endian 32-bit length, then the bytes."""
        size = len(value)
        buffer = buffers.alloc(4 + size)
        ctypes.memmove(buffer.data, struct.pack(">i", size), 4)
        start = ctypes.cast(buffer.data, ctypes.c_void_p).value or 0
        ctypes.memmove(start + 4, bytes(value), size)
        buffer.len = 4 + size
        return buffer

    return lower


def _works(buffers: Any, lower: Any) -> bool:
    try:
        if [name for name, _ in buffers._fields_] != ["capacity", "len", "data"]:
            return False
        buffer = lower(b"trial")
        same: bool = buffer.data[: buffer.len] == b"\0\0\0\5trial" and buffer.capacity >= buffer.len
        buffer.free()
    except (AttributeError, TypeError):
        return False
    return same
