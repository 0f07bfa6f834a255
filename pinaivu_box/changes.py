"""Waiting until something has changed, without looking time and again."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress


class Changes:
    """`count` is that of the changes so far: whoever remembers it misses none."""

    def __init__(self) -> None:
        self.count = 0
        self._next = asyncio.Event()

    def notify(self) -> None:
        """Wake all that wait, who has waited longest first."""
        self.count += 1
        self._next.set()
        self._next = asyncio.Event()

    async def wait(self, count: int, seconds: float | None) -> None:
        """Return once there were more than `count` changes, or after that time (None: never)."""
        if self.count == count:
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._next.wait()

    async def until(self, condition: Callable[[], bool], seconds: float) -> bool:
        """Wait so long for the condition; returns whether it holds."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while not condition():
                    await self._next.wait()
        return condition()
