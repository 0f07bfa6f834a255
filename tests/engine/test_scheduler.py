"""The token scheduler alone: a stand-in engine drives it and checks each step."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from pinaivu_box.engine.detokenizer import Detokenizer
from pinaivu_box.engine.messages import Sampling
from pinaivu_box.engine.scheduler import Chunk, Scheduler
from pinaivu_box.engine.sequence import Sequence, State

GREEDY = Sampling(temperature=0, top_p=1, top_k=0, min_p=0, seed=0)


def sequence(arrival: int, prompt: int, output: int) -> Sequence:
    """`prompt` tokens that are given and `output` that are to be made."""
    return Sequence(
        id=f"r{arrival}",
        tenant="t",
        tokens=[0] * prompt,
        prompt_length=prompt,
        max_length=prompt + output,
        sampling=GREEDY,
        detokenizer=Detokenizer(lambda token: b"", []),
        arrival=arrival,
        arrived_at=0.0,
    )


class Driven(Scheduler):
    """A scheduler that remembers how many sequence ids it was given."""

    def __init__(self, kv: int = 1000, sequences: int = 8, budget: int = 64) -> None:
        super().__init__(kv_tokens=kv, max_sequences=sequences, token_budget=budget)
        self.max_sequences = sequences


def step(s: Driven) -> list[Chunk]:
    """One step of an engine: plan, check what must always hold, commit, give the new tokens."""
    decoding = [q for q in s.running if q.pending == 1]
    before = list(s.running)
    alive = [*s.running, *s.waiting]
    oldest = min(alive, key=lambda q: q.arrival)
    chunks, freed = s.plan()

    # What was preempted is the youngest of what ran.
    gone = [q for q in before if q not in s.running]
    stayed = [q for q in before if q in s.running]
    assert len(freed) == len(set(freed)) == len(gone)
    assert all(old.arrival < young.arrival for old in stayed for young in gone)
    # Every chunk goes on where its sequence stands, once per sequence, and is not empty.
    assert len({id(c.sequence) for c in chunks}) == len(chunks)
    assert all(c.count >= 1 and c.start == c.sequence.computed for c in chunks)
    assert all(c.start + c.count <= len(c.sequence.tokens) for c in chunks)
    assert all(c.sequence in s.running for c in chunks)
    # Ids in the KV cache are unique and in range; who waits has none.
    ids = [q.sequence_id for q in s.running]
    assert len(ids) == len(set(ids)) and all(0 <= i < s.max_sequences for i in ids)
    assert all(q.sequence_id == -1 and q.computed == 0 for q in s.waiting)
    # The budget, the cells, and the streams that must not wait.
    assert 1 <= sum(c.count for c in chunks) <= s.token_budget
    stepped = {id(c.sequence) for c in chunks}
    assert all(id(q) in stepped for q in decoding if q in s.running)
    # No starvation: the oldest runs, keeps what it has and moves on in every step.
    assert oldest in s.running and id(oldest) in stepped

    s.commit(chunks)
    assert s.kv_used == sum(q.computed for q in s.running) <= s.kv_tokens
    for chunk in chunks:
        if chunk.wants_logits:
            chunk.sequence.tokens.append(0)
            if len(chunk.sequence.tokens) >= chunk.sequence.max_length:
                freed_id = chunk.sequence.sequence_id
                assert s.finish(chunk.sequence) == freed_id
    return chunks


@dataclass
class Load:
    """A random workload: when each sequence comes, and at which steps the cache has no slot."""

    kv: int
    sequences: int
    budget: int
    arrivals: list[tuple[int, int, int]]  # step, prompt, output
    no_slot: set[int]


@st.composite
def loads(draw: st.DrawFn) -> Load:
    kv = draw(st.integers(8, 80))
    prompts = st.integers(1, kv - 1)
    arrivals = []
    for _ in range(draw(st.integers(1, 12))):
        prompt = draw(prompts)
        # As the engine does it: prompt and output together fit into the cache.
        output = draw(st.integers(1, min(kv - prompt, 25)))
        arrivals.append((draw(st.integers(0, 30)), prompt, output))
    return Load(
        kv=kv,
        sequences=draw(st.integers(1, 6)),
        budget=draw(st.integers(1, 40)),
        arrivals=sorted(arrivals, key=lambda a: a[0]),
        no_slot=draw(st.sets(st.integers(0, 40), max_size=6)),
    )


@settings(max_examples=400, deadline=None)
@given(loads())
def test_every_sequence_finishes_within_bounds_whatever_comes(load: Load) -> None:
    """Random arrivals on a tight cache: all limits hold in each step and nobody starves."""
    s = Driven(load.kv, load.sequences, load.budget)
    todo = [sequence(n, prompt, output) for n, (_, prompt, output) in enumerate(load.arrivals)]
    ends = {q.id: q.max_length for q in todo}
    times = [at for at, _, _ in load.arrivals]
    came: list[Sequence] = []
    # The oldest moves by at least a token in each step, so this many steps are enough for all.
    most = max(times) + 1 + sum(ends.values())
    for number in range(most + 1):
        while todo and times[len(came)] <= number:
            came.append(todo.pop(0))
            s.add(came[-1])
        if not s and not todo:
            break
        if number in load.no_slot and len(s.running) > 1:
            youngest = max(s.running, key=lambda q: q.arrival)
            its_id = youngest.sequence_id
            assert s.preempt_youngest() == its_id
            assert youngest.state is State.PREEMPTED and s.waiting[0] is youngest
        if s:
            step(s)
    assert not s and not todo
    assert {q.id: len(q.tokens) for q in came} == ends
    assert s.kv_used == 0


def test_a_long_prompt_comes_in_chunks_beside_decoding_sequences() -> None:
    s = Driven(kv=1000, budget=64)
    short = [sequence(n, 4, 100) for n in range(3)]
    for q in short:
        s.add(q)
    step(s)
    long = sequence(9, 300, 5)
    s.add(long)
    sizes = []
    while long.pending > 1:
        counts = {c.sequence.id: c.count for c in step(s)}
        assert [counts[q.id] for q in short] == [1, 1, 1]
        sizes.append(counts["r9"])
    assert sizes == [61, 61, 61, 61, 56]


def test_decode_tokens_come_before_prompt_chunks_when_the_budget_is_short() -> None:
    """Also a prompt admitted before the others does not take their tokens."""
    s = Driven(kv=1000, sequences=4, budget=4)
    s.add(sequence(0, 40, 5))
    for n in (1, 2):
        s.add(sequence(n, 1, 20))
    seen = []
    for _ in range(30):
        step(s)
        seen.append([q.pending for q in s.running])
    assert [1, 1, 1] in seen


def test_only_the_last_chunk_of_a_prompt_gives_logits() -> None:
    s = Driven(budget=10, sequences=2)
    s.add(sequence(0, 25, 3))
    wanted = []
    while s.running or s.waiting:
        chunks, _ = s.plan()
        wanted += [chunk.wants_logits for chunk in chunks]
        s.commit(chunks)
        if wanted[-1]:
            s.finish(chunks[0].sequence)
    assert wanted == [False, False, True]


def test_preemption_takes_the_youngest_and_it_is_the_next_to_go_on() -> None:
    s = Driven(kv=30, sequences=4)
    old, middle, young, waits = (sequence(n, 8, 20) for n in range(4))
    for q in (old, middle, young, waits):
        s.add(q)
    preempted = []
    while not preempted:
        step(s)
        preempted = [q for q in (old, middle, young) if q.state is State.PREEMPTED]
    assert preempted == [young]
    assert list(s.waiting) == [young, waits]
    assert young.computed == 0 and len(young.tokens) > 8  # what it has made is kept
    assert s.preemptions == 1


def test_a_sequence_alone_is_never_preempted() -> None:
    s = Driven(kv=30)
    s.add(sequence(0, 8, 20))
    s.plan()
    assert s.preempt_youngest() is None
    assert len(s.running) == 1 and s.preemptions == 0


def test_no_more_run_than_there_are_sequence_ids_and_ids_are_used_again() -> None:
    s = Driven(kv=1000, sequences=2)
    for n in range(6):
        s.add(sequence(n, 2, 2))
    order = []
    while s:
        order += [c.sequence.id for c in step(s) if c.start == 0]
        assert len(s.running) <= 2
    assert order == ["r0", "r1", "r2", "r3", "r4", "r5"]


def test_finish_frees_cells_and_id_of_a_running_one_and_forgets_a_waiting_one() -> None:
    s = Driven(kv=100, sequences=1)
    running, waiting = sequence(0, 10, 5), sequence(1, 10, 5)
    s.add(running)
    s.add(waiting)
    s.commit(s.plan()[0])
    assert s.kv_used == 10
    assert s.find("r0") is running and s.find("r1") is waiting
    assert s.finish(waiting) == -1 and s.find("r1") is None
    assert s.finish(running) == 0 and s.kv_used == 0
    assert not s


def test_the_budget_is_never_too_small_for_one_token_of_each_sequence() -> None:
    assert Driven(sequences=64, budget=32).token_budget == 64
