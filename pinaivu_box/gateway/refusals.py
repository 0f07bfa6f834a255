"""Errors that were answered, counted by key, model and code."""

from __future__ import annotations

import asyncio
from collections import Counter

from pinaivu_box.gateway.metrics import Metrics
from pinaivu_box.store.database import Database
from pinaivu_box.store.times import now_ms

_HOUR_MS = 3_600_000
_FLUSH_SECONDS = 1.0
_ADD = (
    "INSERT INTO refusals (key_id, since, model, code, count) VALUES (?, ?, ?, ?, ?)"
    " ON CONFLICT DO UPDATE SET count = count + excluded.count"
)


class Refusals:
    """Written together, a second later: a flood of refusals must not become one of writes."""

    def __init__(self, database: Database, metrics: Metrics) -> None:
        self._database = database
        self._metrics = metrics
        self._counts: Counter[tuple[str, int, str, str]] = Counter()
        self._flushing: asyncio.Task[None] | None = None
        self.flushed = 0  # how often they were written

    def note(self, key_id: str, model: str, code: str) -> None:
        self._metrics.refuse(code)
        now = now_ms()
        self._counts[(key_id, now - now % _HOUR_MS, model, code)] += 1
        if self._flushing is None:
            self._flushing = asyncio.create_task(self._flush_later())

    async def flush(self) -> None:
        counts, self._counts = self._counts, Counter()
        if counts:
            await self._database.write(*((_ADD, (*key, n)) for key, n in counts.items()))
            self.flushed += 1

    async def _flush_later(self) -> None:
        await asyncio.sleep(_FLUSH_SECONDS)
        self._flushing = None
        await self.flush()
