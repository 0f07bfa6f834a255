"""Overviews of many requests are not made for each who looks."""

from __future__ import annotations

import asyncio

import pytest

from pinaivu_box.admin.overview import Overview
from pinaivu_box.server.pages.kept_overviews import KeptOverviews
from pinaivu_box.store.usage import Sums
from tests.support.waiting import wait_until

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Maker:
    """Makes overviews of so many requests, and one more each time."""

    def __init__(self, requests: int, seconds: float = 0.05) -> None:
        self.made = 0
        self._requests, self._seconds = requests, seconds

    async def __call__(self) -> Overview:
        await asyncio.sleep(self._seconds)
        self.made += 1
        return Overview("24h", True, [], Sums(requests=self._requests + self.made))


async def test_many_who_ask_at_once_share_one() -> None:
    kept, make = KeptOverviews(), Maker(0)
    found = await asyncio.gather(*(kept.get("box", make) for _ in range(20)))
    assert make.made == 1 and {each.total.requests for each in found} == {1}


async def test_that_of_few_requests_is_made_anew() -> None:
    kept, make = KeptOverviews(), Maker(0)
    assert [(await kept.get("box", make)).total.requests for _ in range(3)] == [1, 2, 3]


async def test_that_of_many_requests_is_shown_while_the_next_is_made() -> None:
    kept, make = KeptOverviews(), Maker(1_000_000)
    first = await kept.get("box", make)
    assert await kept.get("box", make) is first
    assert (await kept.get("account", make)) is not first

    async def changed() -> bool:
        return await kept.get("box", make) is not first

    while not await changed():  # noqa: ASYNC110
        await asyncio.sleep(0.02)


async def test_a_failure_is_told_and_forgotten() -> None:
    kept, make = KeptOverviews(), Maker(1_000_000)

    async def fail() -> Overview:
        raise OSError("no database")

    with pytest.raises(OSError, match="no database"):
        await kept.get("box", fail)
    assert (await kept.get("box", make)).total.requests == 1_000_001
    await wait_until(lambda: make.made == 1)
