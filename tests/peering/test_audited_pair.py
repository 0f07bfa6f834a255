"""Sampled audits of a real box over seeded runs: who cheats is found, who does not is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.audited_pair import audited_pair, speak_loudly
from tests.support.fake_model import FAKE
from tests.support.waiting import wait_until

pytestmark = pytest.mark.anyio
REQUESTS = 50
# Seeds; `tests/bench/audited_pair` makes a hundred runs with a real model.
CHEATING, HONEST = range(8), range(100, 102)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def test_a_cheating_peer_is_found_within_50_of_its_requests(tmp_path: Path) -> None:
    async with audited_pair(tmp_path, FAKE, FAKE) as pair:
        for seed in HONEST:
            assert await pair.found_after(seed, 10) is None
        assert pair.known.undecided == 0
        speak_loudly(pair.ben)
        found = [await pair.found_after(seed, REQUESTS) for seed in CHEATING]
        assert None not in found
        assert pair.anna.pool.reputation.score(pair.ben.node_id) < 0.6


async def test_a_leg_leaves_no_stream_open(tmp_path: Path) -> None:
    """A link has room for few at a time."""
    async with audited_pair(tmp_path, FAKE, FAKE, audit__first=0.0) as pair:
        for number in range(5):
            assert (await pair.anna.chat(str(number), model=FAKE)).status_code == 200
        transports: list[Any] = [box.network._transport for box in (pair.anna, pair.ben)]
        connections = [each for one in transports for each in one.connections]
        assert connections
        # One of each box carries the gossip, for as long as the link lasts.
        await wait_until(lambda: all(len(each._opened) <= 1 for each in connections))
