"""One request's sequence inside an engine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec

from pinaivu_box.engine.fairness import QueuedRequest
from pinaivu_box.engine.images import ImageSpan
from pinaivu_box.engine.messages import Sampling
from pinaivu_box.engine.ngram_drafter import NgramDrafter
from pinaivu_box.engine.prefix_cache import PRIVATE, PrefixScope
from pinaivu_box.engine.replay import Replay
from pinaivu_box.engine.sampling import NO_WINDOW, Draw, PenaltyWindow

if TYPE_CHECKING:
    from pinaivu_box.engine.grammar import Grammar  # llguidance is loaded when it is needed

_SHIFT_KEEP_DIVISOR = 4  # at most a quarter of the context stays from the beginning


@dataclass(eq=False)
class Sequence(QueuedRequest):
    """`tokens` is prompt then output; the first `computed` of them are in the KV cache.

    `shifted` is how many tokens a context shift has taken out of the middle: positions in the text,
    which key the randomness and end at `max_length`, go on counting them.  Before `min_length` no
    end token is drawn.  `images` are where images are in the prompt; a sequence with any is never
    shifted.
    """

    tokens: list[int]
    prompt_length: int
    max_length: int
    context: int  # max tokens at a time
    sampling: Sampling
    min_length: int = 0
    drafter: NgramDrafter | None = None
    draft_rate: float | None = None  # of the draft model's tokens, how many are accepted
    draft_from: int = 0  # tokens that it needs before the draft model is asked again
    grammar: Grammar | None = None
    replay: Replay | None = None  # of an output that is computed again
    logprobs: int | None = None  # with each token, of how many of the likeliest ones
    # Given tokens whose log-probabilities are wanted: the first `scored` were reported, and those
    # up to `scored_to` (None: of the prompt) are still to be; None if none are wanted.
    scored: int | None = None
    scored_to: int | None = None
    images: list[ImageSpan] = field(default_factory=list)
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
    def images_ahead(self) -> Iterator[ImageSpan]:
        """The pieces of images that are not wholly computed."""
        return (span for span in self.images if span.end > self.computed)

    @property
    def next_image(self) -> ImageSpan | None:
        """The first of them."""
        return next(self.images_ahead, None)

    @property
    def text_pending(self) -> int:
        """As `pending`, up to the next image."""
        span = self.next_image if self.images else None
        return self.pending if span is None else max(0, span.start - self.computed)

    def position(self, index: int) -> int:
        """The position in the KV cache of the token with that index, which is in no image after the
        first token of its piece."""
        ahead = sum(span.cells - span.advance for span in self.images if span.start < index)
        return index - ahead

    def whole_pieces(self, length: int) -> int:
        """The first so many tokens, or fewer, so that no piece of an image is cut."""
        cut = (span.start for span in self.images if span.start < length < span.end)
        return next(cut, length)

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
        self.draft_from = 0

    def draw(self, drafted: list[int]) -> Draw:
        """What decides the draw of the token that comes after its own and these."""
        sampling, window, position = self.sampling, NO_WINDOW, self.length + len(drafted)
        if sampling.looks_back:
            window = PenaltyWindow([*self.tokens, *drafted], self.prompt_length)
        if position < self.min_length:
            sampling = msgspec.structs.replace(sampling, ignore_eos=True)
        return Draw(sampling, position, window)

    @property
    def length(self) -> int:
        """The position of the next token in its text."""
        return len(self.tokens) + self.shifted

    @property
    def wants_no_output(self) -> bool:
        """Whether only its prompt was asked for."""
        return self.length >= self.max_length

    @property
    def compares(self) -> bool:
        """Whether more is wanted of its logits than a draw."""
        return self.logprobs is not None or self.replay is not None

    @property
    def plain(self) -> bool:
        """Whether its steps are a draw and nothing else."""
        return self.grammar is None and not self.compares and self.length >= self.min_length
