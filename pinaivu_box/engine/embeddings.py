"""Texts that wait for their vectors.  Between two steps some of them are computed, as several
sequences of one batch, in a context of their own.

Tenants take turns as they do with prompts (`fairness`), and so do the requests of one tenant, text
by text.  A text that is longer than what a step may hold is computed in parts, unless its model has
to see the whole of it.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from pinaivu_box.engine.fairness import FairQueue, QueuedRequest
from pinaivu_box.engine.runner import TEXT_BATCH, Batch, EmbeddingCapacity, Runner
from pinaivu_box.vector_format import shortened

_MIN_PART_TOKENS = 16  # tokens of a part; smaller ones only waste


@dataclass(eq=False)
class EmbeddingJob(QueuedRequest):
    """A request's texts as tokens, and their vectors as far as they are known.  Its `arrival` is
    renewed when the tenant's other requests go before its next text."""

    inputs: list[list[int]]
    dimensions: int | None = None
    started: int = 0  # texts
    computed: dict[int, bytes] = field(default_factory=dict)

    @property
    def pending(self) -> int:
        """Tokens of its next text."""
        return len(self.inputs[self.started])

    @property
    def vectors(self) -> list[bytes]:
        return [self.computed[number] for number in sorted(self.computed)]


@dataclass(eq=False)
class _RunningText:
    """A text that is being computed; `sum` is of its last hidden states so far."""

    job: EmbeddingJob
    number: int
    sequence_id: int
    read: int = 0
    sum: npt.NDArray[np.float64] | None = None

    @property
    def tokens(self) -> list[int]:
        return self.job.inputs[self.number]


class EmbeddingScheduler:
    """Computes the texts of all jobs that are not complete."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._queue: FairQueue[EmbeddingJob] = FairQueue()  # those that have texts not yet begun
        self._all: dict[str, EmbeddingJob] = {}
        self._texts: list[_RunningText] = []  # in the order in which they began
        self._capacity: EmbeddingCapacity | None = None
        self._free: list[int] = []
        self._ended: list[int] = []  # sequence ids whose cells are to be freed
        self._arrivals = itertools.count(1)
        self._reserved = False  # the tenant that has had least waits for room

    def __bool__(self) -> bool:
        return bool(self._all)

    def add(self, embedding: EmbeddingJob) -> None:
        self._all[embedding.id] = embedding
        embedding.arrival = next(self._arrivals)
        self._queue.push(embedding)

    def end(self, request_id: str) -> EmbeddingJob | None:
        """Forget a request; None if it is not here."""
        job = self._all.pop(request_id, None)
        if job is None:
            return None
        for text in [text for text in self._texts if text.job is job]:
            self._leave(text)
        if job.started < len(job.inputs):
            self._queue.remove(job)
        else:
            self._queue.stop(job)
        return job

    def step(self, max_tokens: int) -> tuple[list[EmbeddingJob], int]:
        """Compute `max_tokens` tokens, or one text if it is longer and must be computed whole.

        Returns the requests that are complete by that, and how many tokens were computed.  Raises
        BoxError if the model cannot be used for this: end what is here then.
        """
        counts = self._plan(max_tokens)
        if not counts:
            return [], 0
        ended, self._ended = self._ended, []
        sums = self._runner.embed(_batch(counts), ended)
        for (text, count), summed in zip(counts.items(), sums, strict=True):
            self._take(text, count, summed.astype(np.float64))
        touched = dict.fromkeys(text.job for text in counts)
        complete_jobs = [job for job in touched if len(job.computed) == len(job.inputs)]
        for job in complete_jobs:
            self.end(job.id)
        return complete_jobs, sum(counts.values())

    @property
    def jobs(self) -> list[EmbeddingJob]:
        return list(self._all.values())

    # -- what is computed next -------------------------------------------------------------------

    def _plan(self, max_tokens: int) -> dict[_RunningText, int]:
        """How many tokens of which texts are next, in the order in which the texts began; the
        tenant that has had least is served first."""
        planned: dict[_RunningText, int] = {}
        blocked: set[str] = set()
        self._reserved = False
        left = max_tokens
        while left > 0:
            tenants = [name for name in self._tenants() if name not in blocked]
            if not tenants:
                break
            name = min(tenants, key=self._queue.counter)
            text = self._next(name, planned, left)
            if text is None:
                blocked.add(name)
                continue
            rest = len(text.tokens) - text.read - planned.get(text, 0)
            count = rest
            if self._capacity is None or not self._capacity.whole:
                share = left if self._reserved else max(_MIN_PART_TOKENS, left // len(tenants))
                count = min(rest, left, share)
                # Alone, a text that fits the next step waits for it: attention is computed over
                # all the cells that are held, also by the beginning of a text.
                if count < rest <= max_tokens and planned and len(tenants) == 1:
                    break
            planned[text] = planned.get(text, 0) + count
            left -= count
            self._queue.charge(name, count, 0)
        return {text: planned[text] for text in self._texts if text in planned}

    def _tenants(self) -> list[str]:
        """Those that have anything to compute."""
        return list(dict.fromkeys(job.tenant for job in self._all.values()))

    def _next(
        self, tenant: str, planned: dict[_RunningText, int], left: int
    ) -> _RunningText | None:
        """The tenant's text that is next: one that has begun, or a new one if there is room.

        If there is not, those who have had more only begin what this step completes: else they
        could take the room for ever, text after text.
        """
        for text in self._texts:
            if text.job.tenant == tenant and text.read + planned.get(text, 0) < len(text.tokens):
                return text
        waiting = self._queue.first(tenant)
        if waiting is None or (self._reserved and waiting.pending > left):
            return None
        capacity = self._capacity_for(waiting.pending)
        if capacity.whole and planned and waiting.pending > left:
            return None  # the next step begins with it
        if self._fits(waiting.pending, capacity):
            return self._begin(waiting)
        self._reserved = True
        return None

    def _capacity_for(self, size: int) -> EmbeddingCapacity:
        """The capacity, which is made for longer texts when one comes and no text is running."""
        if self._capacity is None or (size > self._capacity.longest and not self._texts):
            self._capacity = self._runner.prepare_embedding(size)
            self._free, self._ended = list(range(self._capacity.sequences)), []
        return self._capacity

    def _fits(self, size: int, capacity: EmbeddingCapacity) -> bool:
        """Texts that take several steps leave the room of one batch to those that do not."""
        if size > capacity.longest or not self._free:
            return False
        lengths = [len(text.tokens) for text in self._texts]
        if capacity.whole or size <= TEXT_BATCH:
            return capacity.whole or sum(lengths) + size <= capacity.cells
        return sum(length for length in lengths if length > TEXT_BATCH) + size <= (
            capacity.cells - TEXT_BATCH
        )

    def _begin(self, embedding: EmbeddingJob) -> _RunningText:
        embedding.note_start()
        text = _RunningText(embedding, embedding.started, self._free.pop())
        self._texts.append(text)
        embedding.started += 1
        if embedding.started == len(embedding.inputs):
            self._queue.start(embedding)
        else:  # the tenant's other requests come before its next text
            self._queue.later(embedding, next(self._arrivals))
        return text

    # -- what came of it -------------------------------------------------------------------------

    def _take(self, text: _RunningText, count: int, summed: npt.NDArray[np.float64]) -> None:
        text.read += count
        text.sum = summed if text.sum is None else text.sum + summed
        if text.read < len(text.tokens):
            return
        length = max(float(np.linalg.norm(text.sum)), 1e-12)
        # Adding 0.0 makes -0.0 positive: JSON writers do not all keep the sign.
        vector = (text.sum / length + 0.0).astype("<f4").tobytes()
        size = text.job.dimensions
        text.job.computed[text.number] = vector if size is None else shortened(vector, size)
        self._leave(text)

    def _leave(self, text: _RunningText) -> None:
        self._texts.remove(text)
        self._free.append(text.sequence_id)
        if text.read:
            self._ended.append(text.sequence_id)


def _batch(counts: dict[_RunningText, int]) -> Batch:
    tokens: list[int] = []
    positions: list[int] = []
    ids: list[int] = []
    for text, count in counts.items():
        start, end = text.read, text.read + count
        tokens += text.tokens[start:end]
        positions += range(start, end)
        ids += [text.sequence_id] * count
    return Batch.of(tokens, positions, ids, [1] * len(tokens))
