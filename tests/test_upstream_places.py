"""The places of an upstream: who waits, and who is next."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pinaivu_box.upstream.places import Places
from tests.support.waiting import soon


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Visitors:
    """Each enters with its name and stays until it is told to leave."""

    def __init__(self, limit: int) -> None:
        self.places = Places(limit)
        self.inside: list[str] = []
        self.order: list[str] = []
        self._leave: dict[str, asyncio.Event] = {}
        self.tasks: dict[str, asyncio.Task[None]] = {}

    async def come(self, name: str, weight: float = 1.0, priority: int = 0) -> None:
        """`name` is the tenant's, a dot, and what tells its visitors apart."""
        self._leave[name] = asyncio.Event()
        self.tasks[name] = asyncio.create_task(self._stay(name, weight, priority))
        await settled()

    async def _stay(self, name: str, weight: float, priority: int) -> None:
        async with self.places.one(name.partition(".")[0], weight, priority):
            self.inside.append(name)
            self.order.append(name)
            try:
                await self._leave[name].wait()
            finally:
                self.inside.remove(name)

    async def leave(self, name: str) -> None:
        self._leave[name].set()
        await settled()

    async def run_dry(self) -> None:
        while self.inside:
            await self.leave(self.inside[0])


async def settled() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


@pytest.mark.anyio
async def test_whoever_waits_gets_the_place_that_becomes_free() -> None:
    visitors = Visitors(2)
    for name in ("a.1", "a.2", "a.3", "a.4"):
        await visitors.come(name)
    assert visitors.inside == ["a.1", "a.2"] and visitors.places.waiting == 2
    await visitors.leave("a.1")
    assert visitors.inside == ["a.2", "a.3"]
    await visitors.run_dry()
    assert visitors.order == ["a.1", "a.2", "a.3", "a.4"]
    assert (visitors.places.free, visitors.places.waiting) == (2, 0)
    await soon(visitors.places.idle())


@pytest.mark.anyio
async def test_a_tenant_that_floods_it_keeps_nobody_else_out() -> None:
    visitors = Visitors(1)
    for number in range(20):
        await visitors.come(f"flood.{number:02}")
    await visitors.come("small.1")
    await visitors.come("small.2")
    await visitors.run_dry()
    assert {"small.1", "small.2"} <= set(visitors.order[:6])


@pytest.mark.anyio
async def test_weights_and_priorities_count() -> None:
    visitors = Visitors(1)
    await visitors.come("first.1")
    for number in range(30):
        await visitors.come(f"heavy.{number:02}", weight=3)
        await visitors.come(f"light.{number:02}")
    await visitors.come("heavy.urgent", weight=3, priority=5)
    for _ in range(21):
        await visitors.leave(visitors.inside[0])
    shares = Counter(name.partition(".")[0] for name in visitors.order[1:21])
    assert shares["heavy"] == 15 and shares["light"] == 5
    assert visitors.order.index("heavy.urgent") <= 2
    await visitors.run_dry()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3), st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from("cxl"))))
def test_no_place_is_lost_whoever_gives_up(limit: int, steps: list[tuple[str, str]]) -> None:
    async def run() -> None:
        visitors = Visitors(limit)
        for number, (tenant, step) in enumerate(steps):
            if step == "c":
                await visitors.come(f"{tenant}.{number}")
            elif step == "l" and visitors.inside:
                await visitors.leave(visitors.inside[0])
            elif visitors.tasks:  # one that waits, or one that is inside
                names = [name for name, task in visitors.tasks.items() if not task.done()]
                if names:
                    visitors.tasks[names[number % len(names)]].cancel()
                    if number % 2:
                        await settled()
            assert len(visitors.inside) <= limit
        await settled()
        await visitors.run_dry()
        assert (visitors.places.running, visitors.places.waiting) == (0, 0)

    asyncio.run(run())
