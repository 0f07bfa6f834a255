"""Overviews of many requests are shown again, for a minute at most, while new ones are made.

With a few hundred thousand sums an overview takes some hundred milliseconds, and everybody who
looks at a dashboard asks for it every few seconds.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Hashable
from dataclasses import dataclass

from pinaivu_box.admin.overview import Overview

log = logging.getLogger("pinaivu.pages")

# What takes no longer, or is of no more requests, is made anew each time.
_QUICK_SECONDS = 0.02
_FEW_REQUESTS = 500
_REST = 10  # times what it took: so long it is not made again
_MAX_AGE_SECONDS = 60.0
_MAX_KEPT = 100  # overviews

Make = Callable[[], Awaitable[Overview]]


@dataclass(frozen=True)
class _Kept:
    overview: Overview
    made_at: float  # monotonic
    seconds: float  # that it took

    @property
    def age(self) -> float:
        return time.monotonic() - self.made_at


class KeptOverviews:
    """The latest overview of each name that took long."""

    def __init__(self) -> None:
        self._kept: dict[Hashable, _Kept] = {}
        self._making: dict[Hashable, asyncio.Task[Overview]] = {}

    async def get(self, name: Hashable, make: Make) -> Overview:
        """What `make` makes, or has made less than a minute ago.  Raises what it does."""
        kept = self._kept.get(name)
        if kept is None or kept.age > _MAX_AGE_SECONDS:
            return await asyncio.shield(self._made(name, make))
        if kept.age > kept.seconds * _REST:
            self._made(name, make)
        return kept.overview

    def _made(self, name: Hashable, make: Make) -> asyncio.Task[Overview]:
        """By one task, however many ask for it."""
        if (task := self._making.get(name)) is None:
            task = self._making[name] = asyncio.create_task(self._make(name, make))
            task.add_done_callback(_log_failure)
        return task

    async def _make(self, name: Hashable, make: Make) -> Overview:
        began = time.monotonic()
        try:
            overview = await make()
        finally:
            del self._making[name]
        seconds = time.monotonic() - began
        self._kept.pop(name, None)
        if seconds > _QUICK_SECONDS and overview.total.requests > _FEW_REQUESTS:
            self._kept[name] = _Kept(overview, time.monotonic(), seconds)
        while len(self._kept) > _MAX_KEPT:
            del self._kept[next(iter(self._kept))]  # that which was made first
        return overview


def _log_failure(task: asyncio.Task[Overview]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.warning("an overview could not be made: %s", error)
