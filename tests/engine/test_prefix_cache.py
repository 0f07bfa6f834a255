"""The prefix tree against the plainest model of a unified KV cache: a list of cells a sequence."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pinaivu_box.engine.prefix_cache import PrefixCache

TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=6)


class Model(RuleBasedStateMachine):
    """`cells[s]` are the (token, physical cell) pairs of sequence s, as llama.cpp would hold."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = PrefixCache()
        self.cells: dict[int, list[tuple[int, int]]] = {}
        self.finished: list[int] = []
        self.new_cell = itertools.count()
        self.new_id = itertools.count()

    @rule(prompt=st.lists(st.integers(0, 2), max_size=10))
    def admit(self, prompt: list[int]) -> None:
        length, source = self.cache.match(prompt)
        known = [self.common(prompt, sequence) for sequence in self.cells]
        assert length == max(known, default=0)
        if length:
            assert self.common(prompt, source) == length
        sequence = next(self.new_id)
        self.cache.open(sequence, source, length)
        self.cells[sequence] = list(self.cells[source][:length]) if length else []

    @precondition(lambda self: self.live)
    @rule(tokens=TOKENS, pick=st.integers(0, 1000))
    def extend(self, tokens: list[int], pick: int) -> None:
        sequence = self.live[pick % len(self.live)]
        self.cache.extend(sequence, tokens)
        self.cells[sequence] += [(token, next(self.new_cell)) for token in tokens]

    @precondition(lambda self: self.live)
    @rule(pick=st.integers(0, 1000))
    def finish(self, pick: int) -> None:
        sequence = self.live[pick % len(self.live)]
        superfluous = self.cache.keep(sequence)
        self.finished.append(sequence)
        before = self.cache.cells
        for other in superfluous:
            self.remove(other)
        assert self.cache.cells == before, "a superfluous sequence had cells of its own"

    @precondition(lambda self: self.finished)
    @rule()
    def evict(self) -> None:
        oldest = self.cache.oldest()
        assert oldest in self.finished
        self.remove(oldest)

    @precondition(lambda self: self.live)
    @rule(pick=st.integers(0, 1000))
    def abandon(self, pick: int) -> None:
        self.remove(self.live[pick % len(self.live)])

    @invariant()
    def counts_agree(self) -> None:
        self.cache.check_integrity()
        assert self.cache.cells == len({cell for row in self.cells.values() for _, cell in row})
        assert self.cache.cached == len(self.finished)

    @property
    def live(self) -> list[int]:
        return [sequence for sequence in self.cells if sequence not in self.finished]

    def remove(self, sequence: int) -> None:
        self.cache.release(sequence)
        del self.cells[sequence]
        if sequence in self.finished:
            self.finished.remove(sequence)

    def common(self, prompt: list[int], sequence: int) -> int:
        pairs = zip(prompt, self.cells[sequence], strict=False)
        return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1][0], pairs))


TestModel = Model.TestCase
TestModel.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)


def test_the_least_recently_used_goes_first() -> None:
    """Copying from a cached sequence makes it recent."""
    cache = PrefixCache()
    for sequence, token in enumerate([10, 20, 30]):
        cache.open(sequence)
        cache.extend(sequence, [token, token])
        assert cache.keep(sequence) == []
    length, source = cache.match([10, 10, 99])
    assert (length, source) == (2, 0)
    cache.open(3, source, length)
    assert cache.oldest() == 1


def test_truncating_shared_cells_is_refused() -> None:
    """Cells that others use cannot be dropped by one of them."""
    cache = PrefixCache()
    cache.open(0)
    cache.extend(0, [1, 2, 3])
    cache.open(1, 0, 3)
    with pytest.raises(ValueError):
        cache.truncate(0, 1)
    cache.extend(1, [4, 5])
    cache.truncate(1, 1)
    assert cache.cells == 4
    cache.check_integrity()
