"""From the chunks of a step to the batch that is computed."""

from __future__ import annotations

from itertools import takewhile

from pinaivu_box.engine.runner import Batch
from pinaivu_box.engine.scheduler import BatchChunk


def batch_of(chunks: list[BatchChunk]) -> Batch:
    tokens: list[int] = []
    positions: list[int] = []
    ids: list[int] = []
    outputs: list[int] = []
    for chunk in chunks:
        sequence, start, count = chunk.sequence, chunk.start, chunk.count
        if count == 1 and not chunk.draft:
            tokens.append(sequence.tokens[start])
            positions.append(start)
            ids.append(sequence.sequence_id)
            outputs.append(chunk.rows or len(chunk.scored))
            continue
        size = chunk.size
        tokens += sequence.tokens[start : start + count]
        tokens += chunk.draft
        positions += range(start, start + size)
        ids += [sequence.sequence_id] * size
        output_flags = [0] * (size - chunk.rows) + [1] * chunk.rows
        for position in chunk.scored:
            output_flags[position - start] = 1
        outputs += output_flags
    decoding = takewhile(lambda chunk: chunk.count == 1, chunks)
    single = sum(chunk.size for chunk in decoding)
    return Batch.of(tokens, positions, ids, outputs, single)
