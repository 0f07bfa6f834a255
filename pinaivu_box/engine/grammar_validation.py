"""What an output must be, as a grammar for llguidance; and whether that can be followed.

Schemas, regular expressions and grammars are tenants' texts, and a short one can take minutes to
compile.  So this runs in a child with limits first (see `grammar`), and only what has passed is
compiled in the engine: by the same library within the same limits, so that it costs the same.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from typing import Any, cast

import msgspec
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from llguidance.gbnf_to_lark import any_to_lark

from pinaivu_box import chat_format
from pinaivu_box.chat_format import ONE_LINE, THOUGHT
from pinaivu_box.engine.messages import Constraint, Tools
from pinaivu_box.engine.number_bounds import with_an_end
from pinaivu_box.errors import InvalidBody

# llguidance's own limits bound a step to a tenth of a second and more; with these it takes some
# milliseconds.  `initial_lexer_fuel` also bounds what a lexer may grow to later.
LIMITS = LLParserLimits(
    max_items_in_row=1000,
    initial_lexer_fuel=100_000,
    step_lexer_fuel=50_000,
    step_max_items=10_000,
    max_lexer_states=20_000,
    verbose_errors=False,  # an error must not quote what somebody asked
)
# llguidance recurses over nested grammars.  The engine's threads have more than twice of this, so
# that what passes here does not overflow there.
_STACK_BYTES = 1 << 20
_NICE = 5
_FORCED = 16  # how often the trial goes on with what can only come next
_REASON_LENGTH = 1000
_LARK = "lark_grammar"


class Vocabulary(msgspec.Struct, array_like=True, frozen=True):
    """The bytes of each token; control tokens are `special`, and the `ends` among them."""

    tokens: list[bytes]
    special: list[int]
    ends: list[int]


class OutputConstraint(msgspec.Struct, array_like=True, frozen=True):
    """What an output must be: calls of `tools`, in the family's `style` with its `trigger` as Lark
    (see `chat_format`), or else what `constraint` says.

    With `thinking` it begins inside the model's thoughts, which are free.
    """

    constraint: Constraint | None
    tools: Tools | None
    style: str = ""
    trigger: str = ""
    thinking: bool = False

    @property
    def param(self) -> str:
        """The field of the request that says so."""
        if self.tools is not None:
            return "tools"
        schema = self.constraint is not None and self.constraint.kind == "json_schema"
        return "response_format" if schema else "grammar"

    @property
    def name(self) -> str:
        names = {"tools": "grammar of these tools", "response_format": "JSON schema"}
        return names.get(self.param, "grammar")


def tokenizer_of(
    vocabulary: Vocabulary, tokenize: Callable[[bytes | str], list[int]] | None = None
) -> LLTokenizer:
    """For a large vocabulary that takes a second.  Without `tokenize`, a text's tokens are the
    longest that fit."""
    wrapper = TokenizerWrapper(_Wrapped(vocabulary, tokenize))
    made = LLTokenizer(wrapper, n_vocab=len(vocabulary.tokens), eos_token=vocabulary.ends)
    if tokenize is None:
        wrapper._gtokenizer.greedy = made.greedy_tokenize
    return made


class _Wrapped:
    """What llguidance wants to know."""

    bos_token_id = None

    def __init__(
        self, vocabulary: Vocabulary, tokenize: Callable[[bytes | str], list[int]] | None
    ) -> None:
        self.eos_token_id = vocabulary.ends[0]
        self.tokens = vocabulary.tokens
        self.special_token_ids = vocabulary.special
        self.greedy: Callable[[str], list[int]] | None = None
        self._tokenize = tokenize

    def __call__(self, text: bytes | str) -> list[int]:
        if self._tokenize is not None:
            return self._tokenize(text)
        if self.greedy is None:
            return []
        return self.greedy(text.decode(errors="replace") if isinstance(text, bytes) else text)


def make(setup: bytes) -> Callable[[bytes], bytes]:
    """In the child (see `sandbox`): the function of `validator`.  The steps go before it."""
    os.nice(_NICE)
    return validator(setup)


def validator(setup: bytes) -> Callable[[bytes], bytes]:
    """For a `Vocabulary` the function that makes of an `OutputConstraint` the text of its grammar;
    empty if everything is allowed.  It raises InvalidBody."""
    tokenizer = tokenizer_of(msgspec.msgpack.decode(setup, type=Vocabulary))
    decoder = msgspec.msgpack.Decoder(OutputConstraint)

    def run(payload: bytes) -> bytes:
        wanted = decoder.decode(payload)
        text = _text_of(wanted)
        if text is None:
            return b""
        matcher = LLMatcher(tokenizer, text, log_level=0, limits=LIMITS)
        _check(matcher, wanted)
        for _ in range(_FORCED):
            begin(matcher)
            _check(matcher, wanted)
            forced = matcher.compute_ff_tokens()
            if not forced or matcher.is_stopped() or not matcher.consume_tokens(forced):
                break
        _check(matcher, wanted)
        return text.encode()

    return lambda payload: _with_stack(run, payload)


def begin(matcher: LLMatcher) -> None:
    """The first mask is the most expensive: much of the lexer is only made with it."""
    if not matcher.is_error():
        matcher.compute_bitmask()


def refusal(wanted: OutputConstraint, reason: str) -> InvalidBody:
    return InvalidBody(f"this {wanted.name} {reason}", loc=("body", wanted.param))


def _check(matcher: LLMatcher, wanted: OutputConstraint) -> None:
    if matcher.is_error():
        reason = matcher.get_error().replace("<non-verbose/>", "").strip()[:_REASON_LENGTH]
        raise refusal(wanted, f"cannot be followed: {reason}")


def _with_stack(run: Callable[[bytes], bytes], payload: bytes) -> bytes:
    results: list[bytes] = []
    failures: list[BaseException] = []

    def work() -> None:
        try:
            results.append(run(payload))
        except BaseException as error:  # raised again below
            failures.append(error)

    before = threading.stack_size(_STACK_BYTES)
    thread = threading.Thread(target=work)
    thread.start()
    threading.stack_size(before)
    thread.join()
    if failures:
        raise failures[0]
    return results[0]


# -- the text of a grammar -------------------------------------------------------------------------


def _text_of(wanted: OutputConstraint) -> str | None:
    """None if everything is allowed.  Raises InvalidBody."""
    try:
        constraint = wanted.constraint
        if wanted.tools is not None:
            constraint = _of_calls(wanted.tools, wanted)
        if constraint is None:
            return None
        text = _converted(constraint)
        return _after_thoughts(constraint.kind, text) if wanted.thinking else text
    except MemoryError:
        raise
    except RecursionError:
        raise refusal(wanted, "cannot be followed: it is nested too deeply") from None
    except Exception as error:  # the converter of GBNF raises nothing more special
        reason = str(error).strip()[:_REASON_LENGTH]
        raise refusal(wanted, f"cannot be followed: {reason}") from None


def _of_calls(tools: Tools, wanted: OutputConstraint) -> Constraint | None:
    callable_ = set(tools.names)
    functions = [
        {**one, "parameters": with_an_end(one.get("parameters"))}
        for one in json.loads(tools.functions)
        if one["name"] in callable_
    ]
    if not functions:
        return wanted.constraint
    free = tools.choice == "auto"
    named = not free and tools.choice != "required"
    if named:
        functions = [one for one in functions if one["name"] == tools.choice]
    schema = None
    if wanted.constraint is not None:
        options = {**with_an_end(json.loads(wanted.constraint.text)), "x-guidance": ONE_LINE}
        schema = json.dumps(options)
    grammar = chat_format.call_grammar(
        chat_format.STYLES[wanted.style],
        functions,
        several=tools.parallel and not named,
        free=free,
        spell=lambda _: wanted.trigger,
        schema=schema,
    )
    return None if grammar is None else Constraint("lark", grammar)


def _converted(constraint: Constraint) -> str:
    match constraint.kind:
        case "json_schema":
            text = json.dumps(with_an_end(json.loads(constraint.text)))
            return LLMatcher.grammar_from_json_schema(text, overrides=cast(Any, ONE_LINE))
        case "regex":
            return LLMatcher.grammar_from_regex(constraint.text)
        case "gbnf":
            return LLMatcher.grammar_from_lark(any_to_lark(constraint.text))
        case "lark":
            return LLMatcher.grammar_from_lark(constraint.text)


def _after_thoughts(kind: str, grammar: str) -> str:
    # llguidance leaves Lark as it is, and makes JSON of all else.
    plain = kind in ("lark", "gbnf")
    made = {_LARK: grammar} if plain else json.loads(grammar)["grammars"][0]
    answer = {**made, "name": "answer"}
    free = f'start: thoughts /\\n{{0,2}}/ @answer\nthoughts[lazy]: /(.|\\n)*/ "{THOUGHT}"'
    return json.dumps({"grammars": [{_LARK: free}, answer]})
