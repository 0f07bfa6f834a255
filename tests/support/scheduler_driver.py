"""A stand-in for the engine: drives a scheduler and checks each step against a model of the cells.

What a sequence says is fixed beforehand (`Script`), so no model is needed.
"""

from __future__ import annotations

from collections.abc import Callable

from pinaivu_box.engine.batch_chunk import BatchChunk
from pinaivu_box.engine.fairness import State
from pinaivu_box.engine.messages import Sampling
from pinaivu_box.engine.ngram_drafter import NgramDrafter
from pinaivu_box.engine.prefix_cache import PrefixScope
from pinaivu_box.engine.scheduler import Scheduler
from pinaivu_box.engine.sequence import Sequence
from tests.support.engine_harness import Fixed, KVCells

GREEDY = Sampling(temperature=0, top_p=1, top_k=0, min_p=0, seed=0)
MAX_STEPS = 20_000


def sequence(
    arrival: int,
    prompt: int | list[int],
    output: int,
    *,
    tenant: str = "t",
    weight: float = 1.0,
    priority: int = 0,
    drafter: bool = False,
    scope: str = "s",
    public: int = 0,
) -> Sequence:
    """`prompt` tokens that are given (a number: its own ones) and `output` that are to be made."""
    own = [1000 * (arrival + 1) + n for n in range(prompt if isinstance(prompt, int) else 0)]
    tokens = own if isinstance(prompt, int) else list(prompt)
    return Sequence(
        id=f"r{arrival}",
        tenant=tenant,
        tokens=tokens,
        prompt_length=len(tokens),
        max_length=len(tokens) + output,
        context=len(tokens) + output,
        sampling=GREEDY,
        weight=weight,
        priority=priority,
        drafter=NgramDrafter() if drafter else None,
        share=PrefixScope(scope, public, f"named {tokens[:public]}")
        if public and scope
        else PrefixScope(scope),
        arrival=arrival,
        arrived_at=0.0,
    )


def own_words(one: Sequence, position: int) -> int:
    """Nobody else says the same."""
    return -1000 * (one.arrival + 1) - position


class RecordedCells(KVCells):
    """Keeps in `moves` what the scheduler did to cells."""

    def __init__(self, sharing: bool) -> None:
        super().__init__()
        self.moves: list[tuple[str, *tuple[int, ...]]] = []
        self._sharing = sharing

    @property
    def kinds(self) -> list[str]:
        return [kind for kind, *_ in self.moves]

    def remove(self, sequence_id: int) -> None:
        super().remove(sequence_id)
        self.moves.append(("remove", sequence_id))

    def truncate(self, sequence_id: int, length: int) -> None:
        assert self._sharing
        super().truncate(sequence_id, length)
        self.moves.append(("truncate", sequence_id, length))

    def copy(self, source: int, target: int, length: int) -> None:
        assert self._sharing
        super().copy(source, target, length)
        self.moves.append(("copy", source, target, length))


class SchedulerDriver:
    """`said` gives the token of a sequence at a position.

    With `steady` it takes the steps without a plan that the scheduler offers, as the engine does.
    """

    def __init__(
        self,
        *,
        kv: int = 1000,
        sequences: int = 8,
        budget: int = 64,
        ids: int = 0,
        sharing: bool = True,
        draft: int = 0,
        steady: bool = False,
        said: Callable[[Sequence, int], int] = own_words,
    ) -> None:
        self.cells = RecordedCells(sharing)
        self.scheduler = Scheduler(
            self.cells,
            kv_tokens=kv,
            max_sequences=sequences,
            token_budget=budget,
            step_cost=Fixed(draft),
            ids=ids,
            sharing=sharing,
        )
        self.ids = max(ids, sequences)
        self.steps = 0
        self.computed: dict[str, int] = {}  # tokens, by sequence
        self.started: list[Sequence] = []  # in order of the first chunk
        self.ended: list[Sequence] = []
        self._steady = steady
        self._said = said

    def add(self, *sequences: Sequence) -> None:
        for one in sequences:
            self.scheduler.add(one)

    def run(self, steps: int = MAX_STEPS) -> None:
        """So many steps, or until nothing is left."""
        for _ in range(steps):
            if not self.scheduler:
                return
            self.step()
        assert steps < MAX_STEPS, "it does not come to an end"

    def step(self) -> list[BatchChunk]:
        """Plan, check, compute, commit, draw."""
        chunks = self.plan()
        self.compute(chunks)
        return chunks

    def plan(self) -> list[BatchChunk]:
        """The plan, and all that must hold then."""
        streams = [one for one in self.scheduler.running if one.pending == 1]
        preemptions = self.scheduler.preemptions
        chunks = self.scheduler.plan()
        self._check_chunks(chunks)
        if self.scheduler.preemptions == preemptions:  # no stream is left out of a step
            assert {chunk.sequence for chunk in chunks} >= set(streams)
        self._check_cells()
        size = sum(chunk.count + len(chunk.draft) for chunk in chunks)
        assert 1 <= size <= self.scheduler.token_budget
        assert self.cells.used + size <= self.scheduler.kv_tokens
        return chunks

    def compute(self, chunks: list[BatchChunk]) -> None:
        self.steps += 1
        for chunk in chunks:
            one, end = chunk.sequence, chunk.start + chunk.count
            if one.id not in self.computed:
                self.started.append(one)
            tokens = [*one.tokens[chunk.start : end], *chunk.draft]
            for number, token in enumerate(tokens):
                self.cells.append(one.sequence_id, chunk.start + number, token)
            self.computed[one.id] = self.computed.get(one.id, 0) + len(tokens)
        self.scheduler.commit(chunks)
        steady = self.scheduler.steady_steps(chunks)
        for chunk in chunks:
            if chunk.wants_logits:
                self._draw(chunk)
        if self._steady and len(self.scheduler.running) == len(chunks):
            self._go_on(steady)
        self.scheduler.check_integrity()

    def no_slot(self, chunks: list[BatchChunk]) -> bool:
        """The runner had no room for the plan; says whether room could be made."""
        self.scheduler.lower_capacity(sum(chunk.count + len(chunk.draft) for chunk in chunks))
        relieved = self.scheduler.reclaim()
        self.scheduler.check_integrity()
        return relieved

    def end(self, one: Sequence) -> None:
        self.scheduler.finish(one)
        self.ended.append(one)
        self.scheduler.check_integrity()

    def _go_on(self, steps: int) -> None:
        running = self.scheduler.running
        assert not steps or all(one.pending == 1 for one in running)
        for _ in range(steps):
            assert self.cells.used + len(running) <= self.scheduler.kv_tokens
            for one in running:
                self.cells.append(one.sequence_id, one.computed, one.tokens[-1])
                one.computed += 1
                one.tokens.append(self._said(one, len(one.tokens)))
                self.computed[one.id] += 1
                assert len(one.tokens) < one.max_length, "a steady step was the last one"
        self.steps += steps
        self.scheduler.catch_up(running, steps)

    # -- what a step must be ---------------------------------------------------------------------

    def _check_chunks(self, chunks: list[BatchChunk]) -> None:
        scheduler = self.scheduler
        assert len({chunk.sequence for chunk in chunks}) == len(chunks)
        for chunk in chunks:
            one = chunk.sequence
            assert chunk.count >= 1 and chunk.start == one.computed
            assert chunk.start + chunk.count <= len(one.tokens)
            assert one in scheduler.running and one.state is State.RUNNING
            # A draft only comes after all that is known, and leaves room for the draw after it.
            assert not chunk.draft or chunk.wants_logits
            assert len(one.tokens) + len(chunk.draft) < one.max_length

    def _check_cells(self) -> None:
        """The model's cells are what the scheduler believes they are."""
        scheduler = self.scheduler
        scheduler.check_integrity()
        running = [one.sequence_id for one in scheduler.running]
        assert all(0 <= sequence_id < self.ids for sequence_id in running)
        for one in scheduler.running:
            assert self.cells.tokens(one.sequence_id) == one.tokens[: one.computed]
        for one in scheduler.waiting:
            assert one.sequence_id == -1 and one.computed == 0
        for sequence_id in range(self.ids):
            known = sequence_id in scheduler.prefixes
            length = scheduler.prefixes.length(sequence_id) if known else 0
            assert len(self.cells.tokens(sequence_id)) == length
        assert scheduler.kv_used == self.cells.distinct(running)
        assert scheduler.kv_used + scheduler.kv_cached == self.cells.used

    def _draw(self, chunk: BatchChunk) -> None:
        one, draft = chunk.sequence, list(chunk.draft)
        at = len(one.tokens)
        drawn = [self._said(one, at + number) for number in range(1 + len(draft))]
        accepted = 0
        while accepted < len(draft) and draft[accepted] == drawn[accepted]:
            accepted += 1
        one.tokens += drawn[: accepted + 1]
        self.scheduler.accept(chunk, accepted)
        if len(one.tokens) >= one.max_length:
            self.end(one)
