"""The prefix tree against the plainest model of a unified KV cache: a list of cells a sequence."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

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
        self.finished: list[int] = []  # the least recently used first
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
        if length and source in self.finished:  # it was used
            self.finished.remove(source)
            self.finished.append(source)

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

    @precondition(lambda self: any(self.cells[sequence] for sequence in self.finished))
    @rule(pick=st.integers(0, 1000), cut=st.integers(0, 1000))
    def reopen(self, pick: int, cut: int) -> None:
        """A finished sequence goes on, whole or with its first cells only."""
        there = [sequence for sequence in self.finished if self.cells[sequence]]
        sequence = there[pick % len(there)]
        length = len(self.cells[sequence]) - cut % len(self.cells[sequence])
        self.cache.reopen(sequence, length)
        self.finished.remove(sequence)
        del self.cells[sequence][length:]

    @precondition(lambda self: self.finished)
    @rule()
    def evict(self) -> None:
        oldest = self.cache.oldest()
        assert oldest == self.finished[0]
        self.remove(oldest)

    @precondition(lambda self: self.live)
    @rule(pick=st.integers(0, 1000))
    def abandon(self, pick: int) -> None:
        self.remove(self.live[pick % len(self.live)])

    @invariant()
    def counts_agree(self) -> None:
        self.cache.check_integrity()
        assert self.cache.cells == self.distinct(self.cells)
        assert self.cache.live_cells() == self.distinct(self.live)
        assert self.cache.cached == len(self.finished)
        for sequence, cells in self.cells.items():
            assert sequence in self.cache and self.cache.length(sequence) == len(cells)
            assert self.cache.is_cached(sequence) == (sequence in self.finished)
        for spared in self.finished:
            oldest = next((one for one in self.finished if one != spared), None)
            assert self.cache.oldest(but=spared) == oldest

    def distinct(self, sequences: Iterable[int]) -> int:
        return len({cell for sequence in sequences for _, cell in self.cells[sequence]})

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
TestModel.settings = settings(max_examples=100, stateful_step_count=30)


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
