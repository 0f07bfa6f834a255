"""Prompt lookup: what is proposed, and how the chance that it is right is learned."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pinaivu_box.engine.lookup import NGRAM, Lookup


def test_what_followed_the_last_time_is_proposed() -> None:
    assert Lookup().draft([1, 2, 3, 4, 5, 6, 9, 1, 2, 3], 2) == [4, 5]
    assert Lookup().draft([1, 2, 3, 4, 5, 6, 9, 1, 2, 3], 100) == [4, 5, 6, 9, 1, 2, 3]


def test_of_two_times_the_later_one_counts() -> None:
    tokens = [1, 2, 3, 4, 4, 4, 1, 2, 3, 7, 7, 7, 1, 2, 3]
    assert Lookup().draft(tokens, 3) == [7, 7, 7]


def test_what_has_not_come_before_proposes_nothing() -> None:
    assert Lookup().draft([1, 2, 3, 4, 5, 6], 4) == []
    assert Lookup().draft([1, 2, 9, 2, 1, 2], 4) == []  # two alike are too few
    assert Lookup().draft([1, 2], 4) == []
    assert Lookup().draft([], 4) == []


def test_no_more_is_proposed_than_asked_for() -> None:
    lookup = Lookup()
    tokens = [1, 2, 3, 4, 5, 1, 2, 3]
    assert lookup.draft(tokens, 0) == []
    assert lookup.draft(tokens, 1) == [4]


def plain(tokens: list[int], most: int) -> list[int]:
    """The definition, read out."""
    end = tokens[len(tokens) - NGRAM :]
    for start in range(len(tokens) - 1, NGRAM - 1, -1):
        if len(end) == NGRAM and tokens[start - NGRAM : start] == end:
            return tokens[start : start + most]
    return []


@given(
    st.lists(st.integers(0, 2), max_size=60),
    st.lists(st.tuples(st.integers(1, 4), st.integers(0, 5)), max_size=20),
)
def test_one_that_follows_its_sequence_proposes_what_a_fresh_one_would(
    tokens: list[int], asked: list[tuple[int, int]]
) -> None:
    """It looks at new tokens only, however many came since it was last asked."""
    lookup, length = Lookup(), 0
    for more, most in asked:
        length = min(len(tokens), length + more)
        assert lookup.draft(tokens[:length], most) == plain(tokens[:length], most)


def test_the_chance_follows_what_happens() -> None:
    lookup = Lookup()
    start = lookup.acceptance
    lookup.judge(4, 4)
    better = lookup.acceptance
    assert start < better < 1
    lookup.judge(4, 0)  # one was wrong; what came after it says nothing
    assert start < lookup.acceptance < better
    for _ in range(50):
        lookup.judge(3, 0)
    assert 0 < lookup.acceptance < 0.01
    for _ in range(50):
        lookup.judge(3, 3)
    assert 0.99 < lookup.acceptance < 1
