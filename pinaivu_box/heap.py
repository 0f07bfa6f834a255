"""Gives memory that is free in the C library's heap back to the system.

Buffers of requests come and go between small objects that stay.  glibc gives back only what is free
at the heap's end, so that a server's resident memory grows for hours although what it uses does not
(`malloc_trim(3)`).
"""

from __future__ import annotations

import asyncio
import ctypes

_INTERVAL = 60.0  # seconds


def trim() -> None:
    """Give back what is free; does nothing if the C library is not glibc.  Takes milliseconds, in
    which Python's lock is not held."""
    call = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if call is not None:
        call(0)


async def trim_each_minute() -> None:
    while True:
        await asyncio.sleep(_INTERVAL)
        await asyncio.to_thread(trim)
