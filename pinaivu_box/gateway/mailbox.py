"""From one task to another, all that has come at once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Mailbox(Generic[T]):
    """A queue with one reader.

    asyncio.Queue hands out one item at a time, to any number of readers: of the path from a frame
    to the socket that was a sixth.

    `offer` saves waking the reader: while that waits, and so has done with all that it took, an
    item is offered first, and the reader hears of it only if `offer` returns False.
    """

    def __init__(self) -> None:
        self.offer: Callable[[T], bool] | None = None
        self._items: list[T] = []
        self._reader: asyncio.Future[None] | None = None

    def put(self, item: T) -> None:
        """Raises what `offer` does."""
        reader = self._reader
        if reader is not None and not reader.done():
            if self.offer is not None and self.offer(item):
                return
            reader.set_result(None)
        self._items.append(item)

    async def take(self) -> list[T]:
        """What there is, in order; waits until there is something."""
        while not self._items:
            self._reader = asyncio.get_running_loop().create_future()
            try:
                await self._reader
            finally:
                self._reader = None
        items, self._items = self._items, []
        return items
