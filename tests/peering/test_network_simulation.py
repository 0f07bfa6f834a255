"""Thirty boxes on a virtual clock: the same course of events as `tests/bench/simulate_network`."""

from __future__ import annotations

from tests.bench.network_measures import GOALS, simulate


def test_thirty_boxes_reach_the_goals() -> None:
    found = simulate(30)
    missed = [name for name, value, most in GOALS if not value(found) <= most]
    assert not missed, found
    assert found.cuts == 0 and found.unserved == 0
    assert found.newcomer_member < 2 and found.newcomer_advert < 5 and found.revoked_cut < 2
    assert found.dead_last < 10  # seconds until nobody asks the dead any more
    assert found.local > 0.3 and found.best > 0.8
