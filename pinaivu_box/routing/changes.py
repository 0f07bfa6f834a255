"""Waiting until something has changed, without looking time and again."""

from __future__ import annotations

import asyncio
from contextlib import suppress


class Changes:
    """`count` is that of the changes so far: whoever remembers it misses none."""

    def __init__(self) -> None:
        self.count = 0
        self._waiting: set[asyncio.Event] = set()

    def notify(self) -> None:
        self.count += 1
        for event in self._waiting:
            event.set()

    async def wait(self, count: int, seconds: float | None) -> None:
        """Return once there were more than `count` changes, or after that time (None: never)."""
        if self.count != count:
            return
        event = asyncio.Event()
        self._waiting.add(event)
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await event.wait()
        finally:
            self._waiting.discard(event)
