"""The places of an upstream: so many requests run there at a time.

The others wait.  As in an engine, tenants take turns by what they have had, and of a tenant's own
requests the one of the highest priority is next, then the first that came.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field


@dataclass
class _WaitingTenant:
    """Those of it that wait, each with its priority, and what it has had: places by its weight,
    counted from where the others were when it came."""

    had: float
    weight: float = 1.0
    waiting: dict[asyncio.Future[None], int] = field(default_factory=dict)


class Places:
    def __init__(self, limit: int) -> None:
        self.limit, self.running = limit, 0
        self._tenants: dict[str, _WaitingTenant] = {}  # those with requests that wait
        self._had = 0.0  # by whoever had the last place that was waited for
        self._idle = asyncio.Event()  # set whenever a place is given back

    @property
    def free(self) -> int:
        return max(0, self.limit - self.running)

    @property
    def waiting(self) -> int:
        return sum(len(tenant.waiting) for tenant in self._tenants.values())

    @asynccontextmanager
    async def one(self, tenant: str, weight: float = 1.0, priority: int = 0) -> AsyncIterator[None]:
        """Wait for a place, and keep it as long as the block runs."""
        if self.free and not self._tenants:
            self.running += 1
        else:
            await self._turn(tenant, weight, priority)
        try:
            yield
        finally:
            self._give_back()

    async def idle(self) -> None:
        """Wait until nothing runs or waits."""
        while self.running or self._tenants:
            self._idle.clear()
            await self._idle.wait()

    async def _turn(self, name: str, weight: float, priority: int) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        tenant = self._tenants.setdefault(name, _WaitingTenant(self._had))
        tenant.weight = weight
        tenant.waiting[turn] = priority
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # it had the place already
                self._give_back()
            else:
                self._forget(name, turn)
            raise

    def _give_back(self) -> None:
        self.running -= 1
        self._idle.set()
        while self.free and self._tenants:
            name, tenant = min(self._tenants.items(), key=lambda item: item[1].had)
            turn = max(tenant.waiting, key=lambda each: tenant.waiting[each])
            self._forget(name, turn)
            if not turn.done():
                self._had = tenant.had
                tenant.had += 1 / tenant.weight
                self.running += 1
                turn.set_result(None)

    def _forget(self, name: str, turn: asyncio.Future[None]) -> None:
        """It does not wait any more."""
        tenant = self._tenants.get(name)
        if tenant is not None:
            tenant.waiting.pop(turn, None)
            if not tenant.waiting:
                del self._tenants[name]
