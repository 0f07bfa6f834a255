"""With which context an answer was made that is longer than that: from what a shift has left.

A proof says how many tokens were forgotten, and not how large the context was (`Sequence.shift`).
Few sizes lead to the same number.
"""

from __future__ import annotations

_SHIFT_KEEP_DIVISOR = 4  # `engine.sequence`: at most a quarter stays from the beginning
_SMALLEST = 2  # of a smaller one, nothing can be forgotten
_MAX_SIZES = 2**20  # that are tried: who signs a proof chooses its numbers


def shifted_with(context: int, prompt: int, output: int, *, goes_on: bool = False) -> int:
    """How many tokens a context of that size, at least 2, has forgotten after prompt and output.
    The last token makes no room for another one, unless the answer was to go on."""
    length, left, shifted = prompt, output + goes_on, 0
    while context - length < left:
        left -= context - length
        beginning = min(prompt, context // _SHIFT_KEEP_DIVISOR)
        dropped = (context - beginning) // 2
        length = context - dropped
        shifted += dropped
        if prompt == beginning:  # each shift from now on is like this one
            return shifted + max(0, left - 1) // dropped * dropped
        prompt = max(beginning, prompt - dropped)
    return shifted


def may_shift(context: int, prompt: int, output: int, shifted: int) -> bool:
    """Whether a context of that size may have forgotten so many tokens."""
    ways = (shifted_with(context, prompt, output, goes_on=goes_on) for goes_on in (False, True))
    return shifted in ways


def context_of(prompt: int, output: int, shifted: int, usual: int) -> int | None:
    """The size of a context that has forgotten so many tokens: the `usual` one if it may be that,
    else the roundest.  None if there is none."""
    sizes = range(max(_SMALLEST, prompt + 1), prompt + output + 1)[:_MAX_SIZES]
    fit = [context for context in sizes if may_shift(context, prompt, output, shifted)]
    if usual in fit:
        return usual
    return max(fit, key=lambda context: (context & -context, context), default=None)
