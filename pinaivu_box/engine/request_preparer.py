"""Prepares requests for the engine: template, tokens, limits.  Runs in threads beside the steps."""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

from pinaivu_box import chat_format
from pinaivu_box.engine.detokenizer import Detokenizer, text_of
from pinaivu_box.engine.embeddings import EmbeddingJob
from pinaivu_box.engine.images import (
    FIRST_IMAGE_TOKEN,
    ImageMarks,
    ImageReader,
    ImageSpan,
    PromptImage,
)
from pinaivu_box.engine.messages import (
    MAX_FRAME_BYTES,
    Add,
    Embed,
    LoadModel,
    Prompt,
    Refused,
    Tokenize,
    Tokenized,
)
from pinaivu_box.engine.named_prefixes import NamedPrefixes
from pinaivu_box.engine.ngram_drafter import DraftStatistics, NgramDrafter
from pinaivu_box.engine.prefix_cache import PrefixScope
from pinaivu_box.engine.replay import Replay
from pinaivu_box.engine.runner import Runner, TooManyTokens
from pinaivu_box.engine.sandboxed_template import SandboxedTemplate
from pinaivu_box.engine.sandboxes import Sandboxes
from pinaivu_box.engine.sequence import Sequence
from pinaivu_box.errors import ApiError, ContextOverflow, InternalError, InvalidBody
from pinaivu_box.sandbox import Cancellation

if TYPE_CHECKING:
    from pinaivu_box.engine.grammar import GrammarCompiler


_MAX_MEAN_TOKEN_CHARACTERS = 8
_MAX_CHARACTER_BYTES = 4  # and so tokens

_MAX_VECTOR_BYTES = MAX_FRAME_BYTES // 2  # of one request: they are sent in one frame
_MAX_ANSWER_TOKENS = 2**18  # of an answer that is nothing but tokens
_SHORT_CHARACTERS = 16_384  # so many are tokenized at once, whatever they are


@dataclass(frozen=True)
class _ReadPrompt:
    """A prompt's tokens, whether they end inside the model's thoughts, and where images are."""

    tokens: list[int]
    thinking: bool = False
    images: list[ImageSpan] = field(default_factory=list)


@dataclass(frozen=True)
class PreparedRequest:
    """What the output buffer needs (`prompt`, `detokenizer`), and what is scheduled: after
    `compile`, if there is a grammar to compile.  That may take seconds, and end in a refusal."""

    prompt: Prompt
    detokenizer: Detokenizer
    sequence: Sequence | EmbeddingJob
    compile: Callable[[], Refused | None] | None = None


class RequestPreparer:
    """Uses only what is safe beside `decode`: the runner's tokenizer and its facts.  For several
    threads.
    """

    def __init__(self, runner: Runner, sandboxes: Sandboxes, load: LoadModel) -> None:
        facts = runner.facts
        self._runner = runner
        self._context = facts.context
        self._n_vocab = facts.n_vocab
        self._context_shift = load.context_shift
        self._parse_special = load.parse_special
        self._drafting = load.drafting and facts.sharing
        self._grammars: GrammarCompiler | None = None
        self._first_grammar = Lock()
        self._statistics = DraftStatistics()
        self._sandboxes = sandboxes
        self.template = SandboxedTemplate(sandboxes.templates, facts, load)
        self.images = ImageReader(sandboxes.images, runner.projector)
        self._named = NamedPrefixes([], self.template, runner.tokenize)

    def set_named_prefixes(self, texts: list[str]) -> None:
        self._named = NamedPrefixes(texts, self.template, self._runner.tokenize)

    def prepare(
        self, add: Add | Embed, cancellation: Cancellation | None = None
    ) -> PreparedRequest | Refused:
        """Returns what is to be scheduled, or why the request is refused; it is if `cancellation`
        ends it."""
        try:
            if isinstance(add, Embed):
                return self._prepare_texts(add)
            return self._prepare(add, cancellation)
        except Exception as error:  # of one request; the others' engine goes on
            return self._refused(add.id, error, _prompt_param(add))

    def tokenize(
        self, message: Tokenize, cancellation: Cancellation | None = None
    ) -> Tokenized | Refused:
        request = message.request
        name = request.id
        try:
            if message.tokens is not None:
                self._check_tokens(message.tokens, "tokens")
                text = text_of(b"".join(map(self._runner.piece, message.tokens)))
                return Tokenized(name, [] if message.count else message.tokens, text)
            if isinstance(request, Embed):
                inputs = [self._text_tokens(text) for text in request.inputs]
                return Tokenized(name, [token for tokens in inputs for token in tokens])
            if message.plain and isinstance(request.prompt, str):
                tokens = self._read(request.prompt, _MAX_ANSWER_TOKENS, self._runner.tokenize_text)
                return Tokenized(name, tokens, ends=sorted(self._runner.facts.end_tokens))
            limit = max(self._context, _MAX_ANSWER_TOKENS)
            prompt = self._prompt(request, limit, cancellation, exact=message.count)
            if message.count:
                return Tokenized(name, [], thinking=prompt.thinking, count=len(prompt.tokens))
            return Tokenized(name, prompt.tokens, thinking=prompt.thinking)
        except Exception as error:
            if isinstance(error, TooManyTokens) and message.count:
                return Tokenized(name, [], count=error.count)
            if isinstance(error, TooManyTokens) and message.plain:
                most = f"an answer at most {_MAX_ANSWER_TOKENS}: send it in parts"
                error = _invalid("text", f"it has {error}, and {most}")
            return self._refused(name, error, _prompt_param(request))

    def _prepare(self, add: Add, cancellation: Cancellation | None) -> PreparedRequest:
        read = self._prompt(add, self._context, cancellation)
        prompt, thinking = read.tokens, read.thinking
        self._check_tokens([*add.output, *(add.replay or [])], "messages")
        if not prompt:
            raise _invalid("prompt", "the prompt is empty")
        if len(prompt) >= self._context:
            raise TooManyTokens(len(prompt))
        for name in add.sampling.logit_bias:
            if int(name) >= self._n_vocab:
                why = f"logit_bias names token {name}, but there are {self._n_vocab}"
                raise _invalid("logit_bias", why)
        text = text_of(b"".join(map(self._runner.spelling, prompt))) if add.echo else ""
        detokenizer = Detokenizer(self._piece_of(add), add.stop, add.sampling.min_tokens)
        if isinstance(add.prompt, list):
            detokenizer.follow(b"".join(map(self._runner.spelling, prompt[-_MAX_CHARACTER_BYTES:])))
        for token in add.output:
            detokenizer.push(token)  # sent by an earlier leg
        room = self._context - len(prompt)
        # Without a limit of its own a request never needs a context shift: it would never end.
        max_tokens = room if add.max_tokens is None else add.max_tokens
        shifts = self._context_shift and not read.images
        limit = max_tokens if shifts else min(max_tokens, room)
        if add.replay is not None:
            limit = len(add.replay)
            if limit > room and not shifts:
                raise TooManyTokens(len(prompt) + limit)
        drafts = self._drafting and add.replay is None
        sequence = Sequence(
            id=add.id,
            tenant=add.tenant,
            tokens=list(prompt),
            prompt_length=len(prompt),
            max_length=len(prompt) + limit,
            min_length=len(prompt) + add.sampling.min_tokens,
            context=self._context,
            sampling=add.sampling,
            weight=add.weight,
            priority=add.priority,
            drafter=self._make_drafter(add) if drafts and limit <= room else None,
            replay=None if add.replay is None else Replay(add.replay),
            logprobs=add.logprobs,
            scored=add.scored if add.echo and add.logprobs is not None else None,
            images=read.images,
            share=self._named.share(add.scope, prompt) if add.named else PrefixScope(add.scope),
        )
        for token in add.output:  # it may have shifted, as it did in that leg
            sequence.tokens.append(token)
            if len(sequence.tokens) >= self._context:
                sequence.shift()
        if unsaid := min(add.unsaid, len(add.output)):
            sequence.scored_to = len(sequence.tokens)
            sequence.scored = sequence.scored_to - unsaid
        free = add.constraint is None and add.tools is None
        return PreparedRequest(
            Prompt(prompt, thinking, text),
            detokenizer,
            sequence,
            None if free else partial(self._compile, add, sequence, thinking, cancellation),
        )

    def _prepare_texts(self, embed: Embed) -> PreparedRequest:
        size = embed.dimensions or self._runner.facts.n_embd
        if size > self._runner.facts.n_embd:
            why = f"this model's vectors have {self._runner.facts.n_embd} dimensions"
            raise _invalid("dimensions", why)
        if len(embed.inputs) > (max_texts := _MAX_VECTOR_BYTES // (4 * size)):
            raise _invalid(
                "input", f"vectors of this size can be had of {max_texts} texts at a time"
            )
        inputs = [self._text_tokens(text) for text in embed.inputs]
        longest = max(len(tokens) for tokens in inputs)
        if longest > self._context:
            raise TooManyTokens(longest)
        tokens = [token for text in inputs for token in text]
        return PreparedRequest(
            Prompt(tokens),
            Detokenizer(self._runner.piece, []),
            EmbeddingJob(
                embed.id,
                inputs,
                tenant=embed.tenant,
                weight=embed.weight,
                priority=embed.priority,
                dimensions=embed.dimensions,
            ),
        )

    def _text_tokens(self, text: str | list[int]) -> list[int]:
        tokenize = partial(self._runner.tokenize, special=self._parse_special)
        tokens = self._read(text, self._context, tokenize) if isinstance(text, str) else text
        self._check_tokens(tokens, "input")
        if not tokens:
            raise _invalid("input", "the input is empty")
        return tokens

    def _check_tokens(self, tokens: list[int], param: str) -> None:
        if tokens and not (min(tokens) >= 0 and max(tokens) < self._n_vocab):
            raise _invalid(param, f"there are tokens 0 to {self._n_vocab - 1}")

    def _read(
        self,
        text: str,
        limit: int,
        tokenize: Callable[..., list[int]] | None = None,
        *,
        exact: bool = False,
    ) -> list[int]:
        """The tokens of a text, as a prompt or as `tokenize` gives them.  Raises TooManyTokens for
        more than `limit`; unless the number must be `exact`, a text that certainly has more is not
        tokenized."""
        tokenize = tokenize or self._runner.tokenize
        if len(text) <= _SHORT_CHARACTERS:
            return tokenize(text)
        if not exact and (fewest := self._runner.min_token_count(text)) > limit:
            raise TooManyTokens(fewest, exact=False)
        return tokenize(text, limit)

    def _read_parts(self, parts: list[str], limit: int, *, exact: bool) -> list[int]:
        """The same of a prompt in parts (see `control_tokens`)."""
        if len(parts) == 1:
            return self._read(parts[0], limit, exact=exact)
        tokens: list[int] = []
        unread = 0  # tokens of parts that are too long
        for number, part in enumerate(parts):
            tokenize = partial(self._runner.tokenize_text, special=number % 2 == 0)
            try:
                tokens += self._read(part, limit, tokenize if number else None, exact=exact)
            except TooManyTokens as error:
                unread += error.count
                if not exact:
                    raise TooManyTokens(len(tokens) + unread, exact=False) from None
        if len(tokens) + unread > limit:
            raise TooManyTokens(len(tokens) + unread)
        return tokens

    def _read_with_images(
        self, parts: list[list[str]], images: list[PromptImage], limit: int
    ) -> tuple[list[int], list[ImageSpan]]:
        """The same of a prompt with images, one between two texts of a part; and where they are.
        Raises BadRequest if nothing comes after the last one."""
        tokens: list[int] = []
        spans: list[ImageSpan] = []
        following = iter(images)
        for number, texts in enumerate(parts):
            tokenize = partial(self._runner.tokenize_text, special=number % 2 == 0)
            for place, text in enumerate(texts):
                if place:
                    more, found = self.images.tokens([next(following)], len(tokens))
                    tokens, spans = tokens + more, spans + found
                whole_prompt = number == place == 0
                tokens += self._read(text, limit, None if whole_prompt else tokenize)
                if len(tokens) > limit:
                    raise TooManyTokens(len(tokens), exact=False)
        if tokens and tokens[-1] >= FIRST_IMAGE_TOKEN:
            raise _invalid("messages", "the prompt ends with an image: add text after it")
        return tokens, spans

    def _prompt(
        self, add: Add, limit: int, cancellation: Cancellation | None, *, exact: bool = False
    ) -> _ReadPrompt:
        """Raises TooManyTokens."""
        images = self.images.read(add.messages, add.images, cancellation)
        if add.read is not None:
            spans = self.images.found(images, add.read) if images else []
            self._check_tokens(
                [t for t in add.read if t < FIRST_IMAGE_TOKEN or not spans], "messages"
            )
            return _ReadPrompt(add.read, add.thinking, spans)
        if isinstance(add.prompt, list):
            self._check_tokens(add.prompt, "prompt")
            return _ReadPrompt(add.prompt)
        if add.suffix:
            return _ReadPrompt(self._infill(add.prompt or "", add.suffix, limit))
        if add.prompt is not None:
            return _ReadPrompt(self._read(add.prompt, limit, exact=exact))
        marks = ImageMarks()
        try:
            parts = self.template.parts(
                marks.marked(add.messages) if images else add.messages,
                add.tools.functions if add.tools else None,
                add.template,
                cancellation,
            )
        except ContextOverflow:  # by its characters, of which a token has only so many
            raise ContextOverflow.of(self._context + 1, self._context, exact=False) from None
        text = "".join(parts)
        thinking = self.template.thinks and text.rstrip().endswith(chat_format.THINK)
        if not images:
            return _ReadPrompt(self._read_parts(parts, limit, exact=exact), thinking)
        marks.check(text)
        tokens, spans = self._read_with_images(list(map(marks.split, parts)), images, limit)
        return _ReadPrompt(tokens, thinking, spans)

    def _infill(self, prefix: str, suffix: str, limit: int) -> list[int]:
        """In the order that models were trained with: prefix, suffix, then what is between."""
        marks = self._runner.facts.infill
        if marks is None:
            why = "suffix needs a model with infill tokens, and this one has none"
            raise _invalid("suffix", why)
        tokenize = self._runner.tokenize_text
        before, after = (self._read(text, limit, tokenize) for text in (prefix, suffix))
        return [marks[0], *before, marks[1], *after, marks[2]]

    def _make_drafter(self, add: Add) -> NgramDrafter:
        # What cannot come within the context would only cost time in the steps.
        text = add.prediction[: self._context * _MAX_MEAN_TOKEN_CHARACTERS]
        prediction = self._runner.tokenize_text(text)[: self._context] if text else ()
        return NgramDrafter(self._statistics, prediction)

    def _refused(self, request_id: str, error: Exception, prompt_param: str | None) -> Refused:
        if isinstance(error, TooManyTokens):
            error = ContextOverflow.of(
                error.count, self._context, exact=error.exact, param=prompt_param
            )
        if isinstance(error, ApiError):
            return Refused(request_id, error.code, error.message, error.param)
        if isinstance(error, RecursionError):
            return Refused(request_id, InvalidBody.code, "The body is nested too deeply.")
        # A request that our own API has checked does not get here, one of a peer may.  What the
        # error says may quote the prompt.
        where = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{type(error).__name__} in {Path(where.filename).name}, line {where.lineno}"
        why = f"The engine cannot read this request ({place})."
        return Refused(request_id, InternalError.code, why)

    # -- grammars ----------------------------------------------------------------------------------

    def _compile(
        self, add: Add, sequence: Sequence, thinking: bool, cancellation: Cancellation | None
    ) -> Refused | None:
        try:
            # Most engines never need it, nor what it imports.
            from pinaivu_box.engine.grammar import GrammarCompiler
            from pinaivu_box.engine.grammar_validation import OutputConstraint

            with self._first_grammar:
                if self._grammars is None:
                    self._grammars = GrammarCompiler(self._runner, self._sandboxes)
            style = self.template.style
            trigger = self._spell(style.trigger) if add.tools and style.trigger else ""
            constraint = OutputConstraint(add.constraint, add.tools, style.name, trigger, thinking)
            sequence.grammar = grammar = self._grammars.compile(
                constraint, add.tenant, cancellation
            )
            if grammar is not None:
                if add.replay is not None:
                    grammar.drop_budget()
                for token in add.output:
                    grammar.take(token)
        except Exception as error:
            return self._refused(add.id, error, None)
        return None

    def _control(self, text: str) -> int | None:
        """The control token that is spelled so, if there is one."""
        tokens = self._runner.tokenize(text)
        plain = self._runner.tokenize_text(text)
        new = [token for token in tokens if token not in plain]
        control = [token for token in new if not self._runner.piece(token)]
        return control[-1] if control and tokens[-1] == control[-1] else None

    def _spell(self, text: str) -> str:
        token = self._control(text)
        return json.dumps(text) if token is None else f"<[{token}]>"

    def _piece_of(self, add: Add) -> Callable[[int], bytes]:
        """A call's mark may be a control token, which otherwise has no text."""
        piece = self._runner.piece
        trigger = self.template.style.trigger
        token = self._control(trigger) if add.tools is not None and trigger else None
        if token is None:
            return piece
        return lambda other: trigger.encode() if other == token else piece(other)


def _prompt_param(add: Add | Embed) -> str | None:
    """The request's field that holds the prompt, None for messages."""
    if isinstance(add, Embed):
        return "input"
    return None if add.prompt is None else "prompt"


def _invalid(param: str, why: str) -> InvalidBody:
    return InvalidBody(why, loc=("body", param))
