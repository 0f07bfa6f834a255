"""With which context an answer was made that is longer than that: from what a shift has left.

A proof says how many tokens were forgotten, and not how large the context was (`Sequence.shift`).
Few sizes lead to the same number.
"""

from __future__ import annotations

_SHIFT_KEEP_DIVISOR = 4  # `engine.sequence`: at most a quarter stays from the beginning


def shifted_with(context: int, prompt: int, output: int) -> int:
    """How many tokens a context of that size has forgotten after prompt and output.  As long as
    its last token the output makes no room for another."""
    length, left, shifted = prompt, output, 0
    while context - length < left:
        left -= context - length
        beginning = min(prompt, context // _SHIFT_KEEP_DIVISOR)
        dropped = (context - beginning) // 2
        length = context - dropped
        prompt = max(beginning, prompt - dropped)
        shifted += dropped
    return shifted


def context_of(prompt: int, output: int, shifted: int, usual: int) -> int | None:
    """The size of a context that has forgotten so many tokens: the `usual` one if it may be that,
    else the roundest.  None if there is none."""
    fit = [
        context
        for context in range(prompt + 1, prompt + output + 1)
        if shifted_with(context, prompt, output) == shifted
    ]
    if usual in fit:
        return usual
    return max(fit, key=lambda context: (context & -context, context), default=None)
