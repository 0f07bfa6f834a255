"""What is thought of a peer: it follows from what it did, fades, and outlives the box."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from pinaivu_box.routing import reputation
from pinaivu_box.routing.reputation import Reputation
from pinaivu_box.store import peer_tables
from pinaivu_box.store.database import Database
from tests.support.waiting import soon, wait_until

DAY = 86400.0


class Clock:
    now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


def test_each_part_follows_from_what_was_measured() -> None:
    known = Reputation(Clock())
    assert known.score("a") == 1.0 and "not served anything" in known.why("a")
    known.served("a", 100, 100)
    assert known.score("a") == 1.0
    known.served("a", 100, 50)
    assert known.score("a") == pytest.approx(0.95)  # a tenth of what was missing
    known.failed("b", "b was lost")
    assert known.score("b") == pytest.approx(2 / 3)
    known.disputed("c", "its proof is none")
    assert known.score("c") == pytest.approx(0.5)
    for node, said in (("a", "speed 0.95"), ("b", "b was lost"), ("c", "honesty 0.50")):
        assert said in known.why(node)


def test_it_fades_and_a_clock_that_goes_back_does_no_harm() -> None:
    clock = Clock()
    known = Reputation(clock)
    for _ in range(20):
        known.failed("a", "gone")
        known.served("b", 100, 10)
    known.disputed("c", "lied")
    before = {node: known.score(node) for node in "abc"}
    clock.now -= 5 * DAY
    assert {node: known.score(node) for node in "abc"} == before
    clock.now += 6 * DAY
    assert known.score("c") == pytest.approx(0.5**0.5)
    week = [known.score(node) for node in "ab"]
    assert all(after > before[node] for node, after in zip("ab", week, strict=True))
    clock.now += 100 * DAY
    assert all(known.score(node) > 0.99 for node in "abc")


def test_opinions_dated_by_a_clock_that_was_ahead_fade_as_well() -> None:
    clock = Clock()
    ahead = Reputation(lambda: clock.now + 400 * DAY)
    ahead.disputed("c", "lied")
    known = Reputation(clock)
    known.restore(ahead.opinions)
    assert known.score("c") == pytest.approx(0.5)
    clock.now += DAY
    assert known.score("c") == pytest.approx(0.5**0.5)


def test_opinions_are_written_seldom_and_restored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hundred legs are one write; what came after it is written when the box stops."""
    writes = []
    real = peer_tables.keep

    async def counted(database: Database, found: dict[str, peer_tables.StoredOpinion]) -> None:
        writes.append(len(found))
        await real(database, found)

    monkeypatch.setattr(peer_tables, "keep", counted)
    monkeypatch.setattr(reputation, "_SAVE_SECONDS", 0.01)
    clock = Clock()

    async def run() -> None:
        async with Database(tmp_path / "a.db") as database:
            known = Reputation(clock)
            for _ in range(100):
                known.served("a", 100, 70)
                known.failed("b", "b was lost")
            remembering = asyncio.create_task(reputation.load_and_save(known, database))
            await wait_until(lambda: bool(writes))
            assert writes == [2]
            known.disputed("a", "it lied")
            monkeypatch.setattr(reputation, "_SAVE_SECONDS", 3600)
            remembering.cancel()
            await soon(asyncio.wait([remembering]))
            assert sum(writes) == 3
            again = Reputation(clock)
            reading = asyncio.create_task(reputation.load_and_save(again, database))
            await wait_until(lambda: bool(again.opinions))
            assert [again.why(one) for one in "ab"] == [known.why(one) for one in "ab"]
            reading.cancel()
            await soon(asyncio.wait([reading]))
            assert sum(writes) == 3  # nothing new

    asyncio.run(run())
