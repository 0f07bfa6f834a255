"""Background tasks: asyncio holds no reference to them, so somebody else has to."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator
from typing import Any


class TaskSet:
    """Tasks that run beside their caller; each is forgotten when it ends."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    def __len__(self) -> int:
        return len(self._tasks)

    def __iter__(self) -> Iterator[asyncio.Task[Any]]:
        return iter(tuple(self._tasks))

    def add(self, task: asyncio.Task[Any]) -> None:
        """Keep a task that runs already."""
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Start it, and return its task."""
        task = asyncio.create_task(work)
        self.add(task)
        return task

    async def cancel(self) -> None:
        """Cancel all of them and wait until they have ended."""
        tasks = tuple(self)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def finish(self, seconds: float) -> None:
        """Wait until they have ended by themselves; after so long, cancel them."""
        if self._tasks:
            await asyncio.wait(self, timeout=seconds)
        await self.cancel()


def ignore_exception(task: asyncio.Future[Any]) -> None:
    """A done callback for a task whose outcome nobody may be left to ask for: asyncio logs
    exceptions that nobody has retrieved."""
    if not task.cancelled():
        task.exception()
