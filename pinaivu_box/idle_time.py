"""Work for idle time: it waits until there is nothing else to do, and is stopped once there is."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

_IDLE_SECONDS = 1.0  # without anything to do before work begins
_LOOK_SECONDS = 0.1

T = TypeVar("T")


async def until_idle(busy: Callable[[], bool]) -> None:
    """Returns once there was nothing to do for a while."""
    quiet = 0.0
    while quiet < _IDLE_SECONDS:
        await asyncio.sleep(_LOOK_SECONDS)
        quiet = 0.0 if busy() else quiet + _LOOK_SECONDS


async def while_idle(work: Coroutine[Any, Any, T], busy: Callable[[], bool]) -> tuple[T] | None:
    """What the work returns, or None if it was cancelled because there was something else to do.
    Raises what it raises."""
    task = asyncio.create_task(work)
    try:
        while not task.done():
            await asyncio.wait({task}, timeout=_LOOK_SECONDS)
            if busy() and not task.done():
                return None
        return (task.result(),)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
