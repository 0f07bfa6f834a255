"""The token scheduler: which tokens of which sequences are in the next step.  Pure, no I/O.

A step holds every running sequence's next token and, up to the token budget, chunks of prompts
still to be computed (chunked prefill: Agrawal et al., "Sarathi-Serve", OSDI 2024), so that a long
prompt does not stop the running streams.  Waiting sequences are admitted first come first served.
When the KV cache has no room for the next tokens, the youngest sequence is preempted and later
recomputed from its tokens: position-keyed sampling makes it go on as if nothing had happened.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from pinaivu_box.engine.sequence import Sequence, State


@dataclass(frozen=True)
class Chunk:
    """`count` tokens of `sequence` from its position `start`; the last gives logits if wanted."""

    sequence: Sequence
    start: int
    count: int

    @property
    def wants_logits(self) -> bool:
        return self.start + self.count == len(self.sequence.tokens)


class Scheduler:
    """Sizes are in tokens.  `kv_tokens` cells are shared by at most `max_sequences` sequences."""

    def __init__(self, *, kv_tokens: int, max_sequences: int, token_budget: int) -> None:
        self.kv_tokens = kv_tokens
        # Every running sequence must fit into one step with its next token.
        self.token_budget = max(token_budget, max_sequences)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # in order of admission
        self.preemptions = 0
        self._capacity = kv_tokens  # less while the cache has shown that it holds less
        self._free_ids = list(range(max_sequences - 1, -1, -1))

    @property
    def kv_used(self) -> int:
        return sum(sequence.computed for sequence in self.running)

    def __bool__(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def find(self, request_id: str) -> Sequence | None:
        for sequence in (*self.running, *self.waiting):
            if sequence.id == request_id:
                return sequence
        return None

    def finish(self, sequence: Sequence) -> int:
        """Forget a sequence; returns its id in the KV cache, now free, or -1 if it had none."""
        self._capacity = self.kv_tokens
        if sequence in self.waiting:
            self.waiting.remove(sequence)
            return -1
        self.running.remove(sequence)
        return self._release(sequence)

    def plan(self) -> tuple[list[Chunk], list[int]]:
        """The next step's chunks, and the ids of preempted sequences whose cells must be freed.

        Nothing is marked as computed before `commit`.
        """
        freed = self._make_room()
        # A sequence that is alone may try for all there is: nobody else can make room for it.
        capacity = self._capacity if len(self.running) > 1 else self.kv_tokens
        room = capacity - self.kv_used
        budget = min(self.token_budget, room)
        chunks: list[Chunk] = []
        # Decoding sequences first (one token each), then prompts in order of admission.
        for sequence in sorted(self.running, key=lambda s: s.pending > 1):
            count = min(sequence.pending, budget)
            if count:
                chunks.append(Chunk(sequence, sequence.computed, count))
                budget -= count
        while self.waiting and self._free_ids and budget and self._fits(self.waiting[0]):
            sequence = self.waiting.popleft()
            sequence.sequence_id = self._free_ids.pop()
            sequence.state = State.RUNNING
            self.running.append(sequence)
            count = min(sequence.pending, budget)
            chunks.append(Chunk(sequence, 0, count))
            budget -= count
        return chunks, freed

    def commit(self, chunks: list[Chunk]) -> None:
        """The step was computed: its tokens are in the KV cache."""
        for chunk in chunks:
            chunk.sequence.computed += chunk.count

    def shrink(self, planned: int) -> None:
        """A step of `planned` tokens found no room: count on fewer cells until something ends."""
        self._capacity = min(self._capacity, self.kv_used + planned - 1)

    def preempt_youngest(self) -> int | None:
        """Put the youngest running sequence back to the front; its id, or None if it is alone."""
        if len(self.running) < 2:
            return None
        sequence = max(self.running, key=lambda s: s.arrival)
        self.running.remove(sequence)
        freed = self._release(sequence)
        sequence.state = State.PREEMPTED
        self.waiting.appendleft(sequence)
        self.preemptions += 1
        return freed

    def _release(self, sequence: Sequence) -> int:
        freed = sequence.sequence_id
        self._free_ids.append(freed)
        sequence.sequence_id = -1
        sequence.computed = 0
        return freed

    def _make_room(self) -> list[int]:
        freed: list[int] = []
        while self.kv_used + len(self.running) > self._capacity:
            sequence_id = self.preempt_youngest()
            if sequence_id is None:
                break
            freed.append(sequence_id)
        return freed

    def _fits(self, sequence: Sequence) -> bool:
        # Admit only what can be computed whole beside the prompts already admitted, with one more
        # cell for each running sequence: else two half-computed prompts could starve each other.
        committed = sum(len(running.tokens) + 1 for running in self.running)
        return not self.running or committed + len(sequence.tokens) + 1 <= self._capacity
