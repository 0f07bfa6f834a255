"""One request's sequence inside an engine."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pinaivu_box.engine.fairness import QueuedRequest
from pinaivu_box.engine.messages import Sampling
from pinaivu_box.engine.ngram_drafter import NgramDrafter
from pinaivu_box.engine.prefix_cache import PRIVATE, PrefixScope

if TYPE_CHECKING:
    from pinaivu_box.engine.grammar import Grammar  # llguidance is loaded when it is needed

_SHIFT_KEEP_DIVISOR = 4  # at most a quarter of the context stays from the beginning


@dataclass(eq=False)
class Sequence(QueuedRequest):
    """`tokens` is prompt then output; the first `computed` of them are in the KV cache.

    `shifted` is how many tokens a context shift has taken out of the middle: positions in the text,
    which key the randomness and end at `max_length`, go on counting them.  Before `min_length` no
    end token is drawn.
    """

    tokens: list[int]
    prompt_length: int
    max_length: int
    context: int  # max tokens at a time
    sampling: Sampling
    min_length: int = 0
    drafter: NgramDrafter | None = None
    grammar: Grammar | None = None
    logprobs: int | None = None  # with each token, of how many of the likeliest ones
    # Given tokens whose log-probabilities are wanted: the first `scored` were reported, and those
    # up to `scored_to` (None: of the prompt) are still to be; None if none are wanted.
    scored: int | None = None
    scored_to: int | None = None
    share: PrefixScope = field(default_factory=PrefixScope)  # with whom it has cells in common
    cached_tokens: int = 0  # of the prompt, found in the prefix cache when it first ran
    sequence_id: int = -1  # in the KV cache; -1 while not running
    computed: int = 0
    shifted: int = 0
    reported: bool = False  # whether its first token here was

    @property
    def pending(self) -> int:
        """Tokens that are known but not yet in the KV cache; 1 when decoding."""
        return len(self.tokens) - self.computed

    @property
    def unscored(self) -> range:
        """Positions before those given tokens whose log-probabilities are still to be reported."""
        if self.scored is None:
            return range(0)
        end = self.prompt_length if self.scored_to is None else self.scored_to
        return range(self.scored - 1, end - 1)

    @property
    def max_shared_tokens(self) -> int:
        """How many cells of others it may begin with: the positions after them give logits."""
        if self.share.scope == PRIVATE:
            return 0
        return self.unscored.start if self.unscored else len(self.tokens) - 1

    def shift(self) -> None:
        """Context shift: forget half of what comes after the beginning."""
        beginning = min(self.prompt_length, self.context // _SHIFT_KEEP_DIVISOR)
        dropped = (len(self.tokens) - beginning) // 2
        del self.tokens[beginning : beginning + dropped]
        self.prompt_length = max(beginning, self.prompt_length - dropped)
        self.shifted += dropped
        if self.share.public > beginning:
            self.share = PrefixScope(self.share.scope)  # it no longer begins with that text
        self.drafter = None  # it knows positions that are gone

    @property
    def length(self) -> int:
        """The position of the next token in its text."""
        return len(self.tokens) + self.shifted

    @property
    def wants_no_output(self) -> bool:
        """Whether only its prompt was asked for."""
        return self.length >= self.max_length

    @property
    def plain(self) -> bool:
        """Whether its steps are a draw and nothing else."""
        return self.grammar is None and self.logprobs is None and self.length >= self.min_length
