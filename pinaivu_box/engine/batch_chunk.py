"""What a step computes of one sequence."""

from __future__ import annotations

from collections import abc
from dataclasses import dataclass

from pinaivu_box.engine.runner import Batch
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


def batch_of(chunks: list[BatchChunk]) -> Batch:
    """What is computed for the chunks of a step."""
    tokens: list[int] = []
    positions: list[int] = []
    ids: list[int] = []
    outputs: list[int] = []
    for chunk in chunks:
        sequence, start, count = chunk.sequence, chunk.start, chunk.count
        if count == 1 and not chunk.draft:
            tokens.append(sequence.tokens[start])
            positions.append(sequence.position(start))
            ids.append(sequence.sequence_id)
            outputs.append(chunk.rows or len(chunk.scored))
            continue
        size = chunk.size
        tokens += sequence.tokens[start : start + count]
        tokens += chunk.draft
        position = sequence.position(start)
        positions += range(position, position + size)
        ids += [sequence.sequence_id] * size
        output_flags = [0] * (size - chunk.rows) + [1] * chunk.rows
        for position in chunk.scored:
            output_flags[position - start] = 1
        outputs += output_flags
    return Batch.of(tokens, positions, ids, outputs)
