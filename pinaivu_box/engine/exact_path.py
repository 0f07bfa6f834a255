"""Which of the two ways of computing attention a token of a sequence takes, so that it always takes
the same one.

ggml's CPU kernel works in tiles from `BLOCK` rows of a stream on, and row by row below; the two do
not round alike, but neither depends on how many rows more or less there are.  So in exact mode the
way is a function of a token's place in its sequence alone: of the tokens that were given at once
(`Sequence.given`: the prompt, or what a context shift has left), whole blocks of `BLOCK`, counted
from the sequence's beginning, are computed in blocks, and nothing else in the same batch; what is
left of them, and every generated token, in rows, of which a stream has fewer than `BLOCK` in a
batch (and a pool in all).

Cells may be taken from another sequence only if it has computed them in the same way.  So the
prefix cache knows a cell by its token and its way (`names`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pinaivu_box.engine.images import ImageSpan

if TYPE_CHECKING:
    from pinaivu_box.engine import sequence as sequences

BLOCK = 64  # GGML_FA_TILE_Q
MOST_ROWS = BLOCK - 1
MAX_DRAFT_TOKENS = MOST_ROWS - 1  # beside the token before it


def in_block(position: int, given: int, images: Sequence[ImageSpan] = ()) -> bool:
    """Whether the token at that position, of a sequence of which so many tokens were given, is
    computed in a block.  A block that an image has a part of is computed in rows."""
    start = position - position % BLOCK
    end = start + BLOCK
    return end <= given and not any(span.start < end and span.end > start for span in images)


def names(tokens: list[int], start: int, given: int, images: Sequence[ImageSpan] = ()) -> list[int]:
    """The cells of a sequence's `tokens`, the first of which is at position `start`: a token that
    is computed in a block is known by its number, any other by the number's complement, which is
    no token."""
    if images:
        return [
            token if in_block(start + at, given, images) else ~token
            for at, token in enumerate(tokens)
        ]
    blocks = max(0, given - given % BLOCK - start)
    return tokens[:blocks] + [~token for token in tokens[blocks:]]


def cut(length: int, sequence: sequences.Sequence) -> int:
    """How many of the first `length` cells the sequence can go on after: it computes no part of a
    block."""
    return length - length % BLOCK if _is_in_block(sequence, length) else length


def next_tokens(sequence: sequences.Sequence, *, in_blocks: bool) -> int:
    """How many of the tokens that it computes next are computed in blocks, or else in rows; 0 if
    the next one is not.  Those of an image are neither."""
    start, end = sequence.computed, sequence.computed + sequence.text_pending
    at = start
    step = BLOCK if in_blocks else 1
    most = end if in_blocks else min(end, start + MOST_ROWS)
    while at < most and _is_in_block(sequence, at) is in_blocks:
        at += step
    return at - start


def whole_blocks(tokens: int) -> int:
    """So many tokens, or fewer, that are whole blocks."""
    return max(0, tokens - tokens % BLOCK)


def image_part(left: int, budget: int) -> int:
    """How many of the `left` cells of a piece of an image are computed at a time.  A part is either
    the whole piece or at least a block, so that the piece takes the same way however it is cut."""
    part = max(BLOCK, whole_blocks(budget))
    if part >= left:
        return left
    if left - part < BLOCK:
        part -= BLOCK
    return part or left


def _is_in_block(sequence: sequences.Sequence, position: int) -> bool:
    return in_block(position, sequence.given, sequence.images)
