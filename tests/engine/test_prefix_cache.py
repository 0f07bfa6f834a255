"""The prefix tree against the plainest model of a unified KV cache: a list of cells a sequence."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pinaivu_box.engine.prefix_cache import PRIVATE, PrefixCache, PrefixScope

TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=6)
PROMPTS = st.lists(st.integers(0, 2), max_size=10)
SCOPES = st.sampled_from(["a", "b", PRIVATE])
NAMED = [[0], [0, 1, 2], [1, 1]]  # beginnings that are public
OURS = PrefixScope("us")


def share_of(prompt: list[int], scope: str) -> PrefixScope:
    named = [one for one in NAMED if prompt[: len(one)] == one and scope != PRIVATE]
    longest = max(named, key=len, default=[])
    return PrefixScope(scope, len(longest), str(longest) if longest else PRIVATE)


class Model(RuleBasedStateMachine):
    """`cells[s]` are the (token, physical cell) pairs of sequence s, as llama.cpp would hold."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = PrefixCache()
        self.cells: dict[int, list[tuple[int, int]]] = {}
        self.shares: dict[int, PrefixScope] = {}
        self.finished: list[int] = []  # the least recently used first
        self.new_cell = itertools.count()
        self.new_id = itertools.count()

    @rule(prompt=PROMPTS, scope=SCOPES, over=st.booleans())
    def admit(self, prompt: list[int], scope: str, over: bool) -> None:
        share = share_of(prompt, scope)
        length, source = self.cache.match(prompt, share)
        known = [self.common(prompt, share, sequence) for sequence in self.cells]
        assert length == max(known, default=0)
        if length:
            assert self.common(prompt, share, source) == length
        if over and length and source in self.finished:
            self.cache.reopen(source, share, length)
            self.finished.remove(source)
            self.shares[source] = share
            del self.cells[source][length:]
            return
        sequence = next(self.new_id)
        self.cache.open(sequence, share, source, length)
        self.shares[sequence] = share
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
        if self.shares[sequence].scope == PRIVATE:
            self.remove(sequence)  # as the scheduler does
            return
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
        self.cache.reopen(sequence, self.shares[sequence], length)
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
        for sequence, cells in self.cells.items():
            assert sequence in self.cache and self.cache.length(sequence) == len(cells)
            assert self.cache.is_cached(sequence) == (sequence in self.finished)
        for spared in self.finished:
            oldest = next((one for one in self.finished if one != spared), None)
            assert self.cache.oldest(excluding=spared) == oldest

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

    def common(self, prompt: list[int], share: PrefixScope, sequence: int) -> int:
        """How many of its first tokens the sequence has as well, in a scope that it may see."""
        tokens, its = [token for token, _ in self.cells[sequence]], self.shares[sequence]
        if PRIVATE in (share.scope, its.scope):
            return 0
        places = enumerate(zip(prompt, tokens, strict=False))
        alike = (
            mine == other and scope_at(share, at) == scope_at(its, at)
            for at, (mine, other) in places
        )
        return sum(1 for _ in itertools.takewhile(bool, alike))


def scope_at(share: PrefixScope, at: int) -> str:
    return share.common if at < share.public else share.scope


TestModel = Model.TestCase
TestModel.settings = settings(max_examples=100, stateful_step_count=30)


def test_the_least_recently_used_goes_first() -> None:
    """Copying from a cached sequence makes it recent."""
    cache = PrefixCache()
    for sequence, token in enumerate([10, 20, 30]):
        cache.open(sequence, OURS)
        cache.extend(sequence, [token, token])
        assert cache.keep(sequence) == []
    length, source = cache.match([10, 10, 99], OURS)
    assert (length, source) == (2, 0)
    cache.open(3, OURS, source, length)
    assert cache.oldest() == 1


# -- who finds what --------------------------------------------------------------------------------


def filled(tokens: list[int], share: PrefixScope) -> PrefixCache:
    cache = PrefixCache()
    cache.open(0, share)
    cache.extend(0, tokens)
    return cache


@pytest.mark.parametrize("kept", [False, True], ids=["running", "kept"])
def test_a_scope_finds_its_own_and_nothing_else(kept: bool) -> None:
    cache = filled([1, 2, 3], PrefixScope("a"))
    if kept:
        cache.keep(0)
    assert cache.match([1, 2, 3, 4], PrefixScope("a")) == (3, 0)
    for other in (
        PrefixScope("b"),
        PrefixScope("aa"),
        PrefixScope(),
        public("b", 2),
        public("a", 2),
    ):
        assert cache.match([1, 2, 3, 4], other) == (0, -1)


def public(scope: str, length: int, name: str = "named") -> PrefixScope:
    return PrefixScope(scope, length, name)


def test_private_cells_are_found_by_nobody() -> None:
    cache = filled([1, 2, 3], PrefixScope())
    for share in (PrefixScope(), PrefixScope("a"), public("a", 2)):
        assert cache.match([1, 2, 3], share) == (0, -1)


def test_other_scopes_find_the_named_prefix_and_no_more() -> None:
    """What comes behind it, and other texts that begin as it does, stay within their scopes."""
    cache = filled([1, 2, 3, 4, 5], public("a", 3))
    assert cache.match([1, 2, 3, 4, 5], public("a", 3)) == (5, 0)
    assert cache.match([1, 2, 3, 4, 5], public("b", 3)) == (3, 0)
    assert cache.match([1, 2, 3, 4, 5], PrefixScope("b")) == (0, -1)
    assert cache.match([1, 2, 3, 4, 5], PrefixScope("a")) == (0, -1)
    assert cache.match([1, 2, 9, 4, 5], public("b", 2, "another")) == (0, -1)
    # Who begins otherwise is not found by the part that it has in common with what is named.
    assert filled([1, 2, 9], PrefixScope("a")).match([1, 2, 3, 4], public("b", 3)) == (0, -1)


def test_a_named_prefix_may_be_computed_in_pieces() -> None:
    cache = PrefixCache()
    cache.open(0, public("a", 3))
    for tokens in ([1], [2], [3, 4], [5]):
        cache.extend(0, tokens)
        cache.check_integrity()
    cache.open(1, public("b", 3), *reversed(cache.match([1, 2, 3, 4], public("b", 3))))
    cache.extend(1, [4])
    cache.check_integrity()
    assert cache.cells == 5 + 1
    cache.release(0)
    assert cache.cells == 4 and cache.match([1, 2, 3, 4], public("c", 3)) == (3, 1)
    cache.check_integrity()
