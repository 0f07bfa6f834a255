"""Two mends for iroh 1.2.0's Python bindings, which uniffi 0.31 made.

**Copying.**  What is sent is copied byte by byte in Python (5 MB/s).  0.32 does what we do here.
Private names are replaced, so each is looked for first, and the result is tried.

**Freeing.**  iroh's own thread calls into Python to wake a coroutine, and does so while it holds
the lock of a connection.  If Python's garbage collector happens to run in that call and finds a
stream of the same connection, `__del__` frees it there, which takes the lock that the thread
already has: iroh stands still for ever, then our event loop at its next call, and our peers believe
us dead.  So nothing is freed in `__del__`; a thread of ours that holds no lock does it.
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
_unwanted: SimpleQueue[tuple[Free, Any]] = SimpleQueue()  # which may be put to in a `__del__`


def mend() -> None:
    """Both, once for each process."""
    mend_copying()
    mend_freeing()
    threading.Thread(target=_free_for_ever, name="iroh-free", daemon=True).start()


def mend_freeing(ffi: Any = iroh.iroh_ffi) -> None:
    for kind in vars(ffi).values():
        if isinstance(kind, type) and "__del__" in vars(kind):
            kind.__del__ = _later(vars(kind)["__del__"])  # type: ignore[attr-defined]


def _later(free: Free) -> Free:
    def __del__(self: Any) -> None:  # noqa: N807
        _unwanted.put((free, self))  # it lives once more; Python calls `__del__` only once

    return __del__


def _free_for_ever() -> None:
    while True:
        free, it = _unwanted.get()
        try:
            free(it)
        except Exception:
            log.exception("iroh could not free something")
        del it  # not kept until the next one comes


def mend_copying(ffi: Any = iroh.iroh_ffi, found: str | None = None) -> bool:
    """Replace the copying once; whether it is replaced.  `ffi` and `found` are for tests."""
    converter = getattr(ffi, "_UniffiFfiConverterBytes", None)
    buffers = getattr(ffi, "_UniffiRustBuffer", None)
    lower = _copying_at_once(buffers)
    known = (found or version("iroh")) == KNOWN and hasattr(converter, "lower")
    if not known or not _works(buffers, lower):
        log.warning("iroh's bindings are not those we know: links will be slow")
        return False
    converter.lower = staticmethod(lower)  # type: ignore[union-attr]
    return True


def _copying_at_once(buffers: Any) -> Any:
    def lower(value: bytes) -> Any:
        """As uniffi lays out bytes: a big-endian 32-bit length, then they."""
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
        made = lower(b"trial")
        same: bool = made.data[: made.len] == b"\0\0\0\5trial" and made.capacity >= made.len
        made.free()
    except (AttributeError, TypeError):
        return False
    return same
