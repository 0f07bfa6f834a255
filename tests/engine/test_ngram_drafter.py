"""Prompt lookup: what is proposed, and how the rate that it is right is learned."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pinaivu_box.engine.ngram_drafter import NGRAM, DraftStatistics, NgramDrafter


def draft(tokens: list[int], count: int) -> list[int]:
    """Of one that has not seen the tokens before."""
    drafter = NgramDrafter()
    return drafter.draft(tokens, count) if drafter.match(tokens) else []


def test_a_draft_is_the_text_after_the_last_occurrence() -> None:
    assert draft([1, 2, 3, 4, 5, 6, 9, 1, 2, 3], 2) == [4, 5]
    assert draft([1, 2, 3, 4, 5, 6, 9, 1, 2, 3], 7) == [4, 5, 6, 9, 1, 2, 3]


def test_of_two_times_the_later_one_counts() -> None:
    tokens = [1, 2, 3, 4, 4, 4, 1, 2, 3, 7, 7, 7, 1, 2, 3]
    assert draft(tokens, 3) == [7, 7, 7]


def test_a_draft_of_a_loop_continues_the_loop() -> None:
    """However short the loop is, a draft may be long."""
    assert draft([9, 5, 5, 5, 5], 6) == [5] * 6
    assert draft([9, 1, 2, 1, 2, 1], 5) == [2, 1, 2, 1, 2]
    assert draft([1, 2, 3, 4, 1, 2, 3], 9) == [4, 1, 2, 3, 4, 1, 2, 3, 4]


def test_there_is_no_draft_without_an_earlier_occurrence() -> None:
    assert NgramDrafter().match([1, 2, 3, 4, 5, 6]) == 0
    assert NgramDrafter().match([1, 2, 9, 2, 1, 2]) == 0  # two alike are too few
    assert NgramDrafter().match([1, 2]) == 0
    assert NgramDrafter().match([]) == 0


def plain(tokens: list[int], count: int) -> list[int]:
    """The definition, read out."""
    end = tokens[len(tokens) - NGRAM :]
    for start in range(len(tokens) - 1, NGRAM - 1, -1):
        if len(end) == NGRAM and tokens[start - NGRAM : start] == end:
            return [tokens[start + n % (len(tokens) - start)] for n in range(count)]
    return []


@given(
    st.lists(st.integers(0, 2), max_size=60),
    st.lists(st.tuples(st.integers(1, 4), st.integers(0, 5)), max_size=20),
)
def test_a_drafter_that_follows_its_sequence_drafts_as_a_fresh_one_would(
    tokens: list[int], asked: list[tuple[int, int]]
) -> None:
    """It looks at new tokens only, however many came since it was last asked."""
    drafter, length = NgramDrafter(), 0
    for more, most in asked:
        length = min(len(tokens), length + more)
        so_far = tokens[:length]
        made = drafter.draft(so_far, most) if drafter.match(so_far) else []
        assert made == plain(so_far, most)


def test_the_longer_the_match_the_better_the_chance() -> None:
    again = [*range(20), 99]
    chances = [NgramDrafter().match([*again, *range(19 - length, 19)]) for length in range(3, 13)]
    assert chances == sorted(chances)
    assert 0 < chances[0] < chances[-1] < 1


def test_the_acceptance_rate_is_learned_also_without_drafts() -> None:
    drafter, tokens = NgramDrafter(), list(range(40))
    tokens += [100, *range(12)]
    before = drafter.match(tokens)
    for token in (12, 13, 14):  # as in the text
        tokens.append(token)
        better = drafter.match(tokens)
        assert before < better < 1
        before = better
    tokens += [15, 16, 17]  # several at once
    best = drafter.match(tokens)
    assert best > before
    tokens += [18, 99, 20, 21, 22]  # one was wrong; what came after it says nothing
    assert drafter.match(tokens) > 0  # a short match, of another kind
    tokens += range(23, 33)
    assert best - 0.3 < drafter.match(tokens) < best


def test_the_acceptance_rate_falls_fast_if_drafts_are_wrong() -> None:
    drafter, rate = NgramDrafter(), 1.0
    tokens = [1, 2, 3, 4]
    for number in range(100, 120):
        tokens += [1, 2, 3]
        rate = drafter.match(tokens)
        tokens.append(number)
        drafter.match(tokens)
    assert 0 < rate < 0.05


def test_a_new_sequence_begins_with_the_shared_acceptance_rates() -> None:
    """Where drafts are mostly wrong fewer are made, from the first token on; and the reverse."""
    bad, good = DraftStatistics(), DraftStatistics()
    for n in range(60):
        wrong, right = NgramDrafter(bad), NgramDrafter(good)
        start = [1, 2, 3, 4, 5, 6, 9, 1, 2, 3]
        for drafter, after in ((wrong, 100 + n), (right, 4)):
            drafter.match(start)
            drafter.match([*start, after])
    fresh = NgramDrafter().match(start)
    assert NgramDrafter(bad).match(start) < fresh / 2
    assert NgramDrafter(good).match(start) > fresh
    # Who gives a prediction is believed at first.
    assert NgramDrafter(bad, [7]).match(start) == fresh


def test_a_prediction_is_text_that_may_come() -> None:
    drafter = NgramDrafter(None, [5, 6, 7, 8, 9, 10])
    assert drafter.match([1, 2, 5, 6, 7]) > 0
    assert drafter.draft([1, 2, 5, 6, 7], 3) == [8, 9, 10]
    assert NgramDrafter().match([1, 2, 5, 6, 7]) == 0
