"""The verdict of `tests/bench/soak`: what it calls flat, and what it finds between answers and
receipts."""

from __future__ import annotations

import os
from collections import Counter

from tests.bench import soak_measures
from tests.bench.soak_measures import (
    Answers,
    Sample,
    growth,
    left_open,
    plain,
    warnings,
    wrong_receipts,
)


def samples(*sizes: float) -> list[Sample]:
    return [
        Sample(10.0 * number, 1, round(size), 0, round(size), 9, 4, 0.0)
        for number, size in enumerate(sizes)
    ]


def test_memory_that_only_warms_up_is_flat() -> None:
    found = growth(samples(*(100_000 - 40_000 * 0.8**n for n in range(100))))
    assert found is not None and found.flat and 0 <= found.share < 0.01


def test_a_peak_is_no_growth() -> None:
    found = growth(samples(*(150_000 if n == 90 else 100_000 for n in range(100))))
    assert found is not None and found.flat and found.share == 0


def test_memory_that_grows_steadily_is_not_flat() -> None:
    found = growth(samples(*(100_000 + 100 * n for n in range(100))))
    assert found is not None and not found.flat
    assert 0.04 < found.share < 0.05 and found.fitted > 0.04


def test_few_samples_say_nothing() -> None:
    assert growth(samples(*[100_000] * 15)) is None


def test_this_process_is_measured() -> None:
    before = soak_measures.descriptors(os.getpid())
    reader, writer = os.pipe()
    try:
        found = soak_measures.sample(os.getpid(), 1.0)
        assert found is not None and found.rss > 10_000 and found.descriptors >= 3
        assert left_open(before, soak_measures.descriptors(os.getpid())) == {"pipe": 2}
    finally:
        os.close(reader)
        os.close(writer)
    assert left_open(before, soak_measures.descriptors(os.getpid())) == {}
    assert soak_measures.sample(2**22 + 1, 1.0) is None


def answers() -> Answers:
    """Of six requests two were answered, one was left, one before it had an id, one refused, and
    one ended in the middle, which somebody could have served."""
    return Answers(
        sent=6, answered={"a", "b"}, cut={"c"}, cut_early=1, refused=Counter({"503": 1}),
        turned_away=Counter({"lost": 1}), failed_ids={"e"},
    )  # fmt: skip


def test_answers_and_receipts_that_match() -> None:
    assert wrong_receipts(answers(), {"a", "b", "c"}) == []
    assert wrong_receipts(answers(), {"a", "b", "c", "e", "of who left early"}) == []


def test_answers_and_receipts_that_do_not_match() -> None:
    assert "1 answers have no receipt, such as b" in wrong_receipts(answers(), {"a", "c"})[0]
    assert "clients left" in wrong_receipts(answers(), {"a", "b"})[0]
    assert "no client has" in wrong_receipts(answers(), {"a", "b", "c", "x", "y"})[0]
    unfinished = answers()
    unfinished.sent += 1
    assert wrong_receipts(unfinished, {"a", "b", "c"}) == ["7 requests were sent, and 6 ended"]


def test_refusals_are_counted_by_their_kind() -> None:
    one = "node_1a2b3c4d stalled: nothing came for 4.0 s"
    other = "node_9f8e7d6c stalled: nothing came for 12.7 s"
    assert plain(one) == plain(other) == "node_N stalled: nothing came for N s"
    log = f"""2026-12-01T05:49:57.961Z info    link to node_1a2b3c4d is up
2026-12-01T05:50:57.961Z warning {one}
2026-12-01T05:51:57.961Z warning {other}
  a line of a traceback
2026-12-01T05:52:57.961Z error   nothing can be written
"""
    assert warnings(log) == {
        "warning node_N stalled: nothing came for N s": 2,
        "error nothing can be written": 1,
    }
