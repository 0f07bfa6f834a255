"""The body of an HTTP answer, read up to a limit: whoever answers might send without end."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import httpx


async def read(answer: httpx.Response, max_bytes: int) -> bytes | None:
    """The whole body; None if it is longer."""
    data = bytearray()
    async for part in answer.aiter_bytes():
        data += part
        if len(data) > max_bytes:
            return None
    return bytes(data)
