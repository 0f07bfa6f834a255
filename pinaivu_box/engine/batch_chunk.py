"""What a step computes of one sequence."""

from __future__ import annotations

from collections import abc
from dataclasses import dataclass

from pinaivu_box.engine.sequence import Sequence


@dataclass(frozen=True)
class BatchChunk:
    """`count` known tokens of `sequence` from its position `start`, then `draft`.

    Logits come from the last known token if no other follows it, from each drafted one, and from
    the positions `scored`, for the log-probabilities of the prompt's tokens after them.
    """

    sequence: Sequence
    start: int
    count: int
    draft: abc.Sequence[int] = ()

    @property
    def size(self) -> int:
        return self.count + len(self.draft)

    @property
    def wants_logits(self) -> bool:
        return self.start + self.count == len(self.sequence.tokens)

    @property
    def rows(self) -> int:
        """How many of its logits are drawn from."""
        return 1 + len(self.draft) if self.wants_logits else 0

    @property
    def scored(self) -> range:
        unscored = self.sequence.unscored
        if not unscored:
            return unscored
        start, end = self.start, self.start + self.count
        return range(max(start, unscored.start), min(end, unscored.stop))
