"""Turns what an output must be into a grammar for llguidance, and checks that it can be followed.

Schemas, regular expressions and grammars are tenants' texts, and a short one can take minutes to
compile.  So this runs in a child with limits first (see `grammar`), and only what has passed is
compiled in the engine: by the same library within the same limits, so that it costs the same.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
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
    verbose_errors=False,  # an error must not quote a request
)
# llguidance recurses over nested grammars.  The engine's threads have more than twice of this, so
# that what passes here does not overflow there.
_STACK_BYTES = 1 << 20
_NICE = 5
_MAX_FORCED_RUNS = 16  # how often a validation goes on with the tokens that are forced
_MAX_REASON_CHARACTERS = 1000
_LARK = "lark_grammar"

Tokenize = Callable[[str], list[int]]


class GrammarVocabulary(msgspec.Struct, array_like=True, frozen=True):
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
        """The field of the request that sets it."""
        if self.tools is not None:
            return "tools"
        schema = self.constraint is not None and self.constraint.kind == "json_schema"
        return "response_format" if schema else "grammar"

    @property
    def name(self) -> str:
        """What it is called in errors."""
        names = {"tools": "grammar of these tools", "response_format": "JSON schema"}
        return names.get(self.param, "grammar")


def tokenizer_of(vocabulary: GrammarVocabulary, tokenize: Tokenize | None = None) -> LLTokenizer:
    """Takes a second for a large vocabulary.  Without `tokenize`, a text's tokens are the longest
    that fit."""
    wrapped = _Wrapped(vocabulary, tokenize)
    tokenizer = LLTokenizer(
        TokenizerWrapper(wrapped), n_vocab=len(vocabulary.tokens), eos_token=vocabulary.ends
    )
    wrapped.tokenize = tokenize or tokenizer.greedy_tokenize
    return tokenizer


class _Wrapped:
    """What llguidance's wrapper needs of a tokenizer."""

    bos_token_id = None

    def __init__(self, vocabulary: GrammarVocabulary, tokenize: Tokenize | None) -> None:
        self.eos_token_id = vocabulary.ends[0]
        self.tokens = vocabulary.tokens
        self.special_token_ids = vocabulary.special
        self.tokenize = tokenize

    def __call__(self, text: bytes | str) -> list[int]:
        if self.tokenize is None:
            return []
        return self.tokenize(text.decode(errors="replace") if isinstance(text, bytes) else text)


def make(setup: bytes) -> Callable[[bytes], bytes]:
    """The child's part (see `sandbox`): a `validator` that yields to the engine's steps."""
    os.nice(_NICE)
    return validator(setup)


def validator(setup: bytes) -> Callable[[bytes], bytes]:
    """For a `GrammarVocabulary`, the function that turns an `OutputConstraint` into the text of its
    grammar; empty if everything is allowed.  It raises InvalidBody."""
    tokenizer = tokenizer_of(msgspec.msgpack.decode(setup, type=GrammarVocabulary))
    decoder = msgspec.msgpack.Decoder(OutputConstraint)

    def run(payload: bytes) -> bytes:
        output = decoder.decode(payload)
        text = _grammar_text(output)
        if text is None:
            return b""
        matcher = LLMatcher(tokenizer, text, log_level=0, limits=LIMITS)
        _check(matcher, output)
        for _ in range(_MAX_FORCED_RUNS):
            compute_first_mask(matcher)
            _check(matcher, output)
            forced = matcher.compute_ff_tokens()
            if not forced or matcher.is_stopped() or not matcher.consume_tokens(forced):
                break
        _check(matcher, output)
        return text.encode()

    return lambda payload: _with_stack(run, payload)


def compute_first_mask(matcher: LLMatcher) -> None:
    """The first mask is the most expensive: much of the lexer is only made with it."""
    if not matcher.is_error():
        matcher.compute_bitmask()


def refusal(output: OutputConstraint, reason: str) -> InvalidBody:
    return InvalidBody(f"this {output.name} {reason}", loc=("body", output.param))


def _check(matcher: LLMatcher, output: OutputConstraint) -> None:
    if matcher.is_error():
        reason = matcher.get_error().replace("<non-verbose/>", "").strip()
        raise refusal(output, f"cannot be followed: {reason[:_MAX_REASON_CHARACTERS]}")


def _with_stack(run: Callable[[bytes], bytes], payload: bytes) -> bytes:
    before = threading.stack_size(_STACK_BYTES)
    with ThreadPoolExecutor(1) as thread:
        result = thread.submit(run, payload)  # which starts the thread
        threading.stack_size(before)
    return result.result()


# -- the text of a grammar -------------------------------------------------------------------------


def _grammar_text(output: OutputConstraint) -> str | None:
    """Returns None if everything is allowed.  Raises InvalidBody."""
    try:
        constraint = output.constraint
        if output.tools is not None:
            constraint = _call_constraint(output.tools, output)
        if constraint is None:
            return None
        text = _converted(constraint)
        return _after_thoughts(constraint.kind, text) if output.thinking else text
    except MemoryError:
        raise
    except RecursionError:
        raise refusal(output, "cannot be followed: it is nested too deeply") from None
    except Exception as error:  # the converter of GBNF raises nothing more special
        reason = str(error).strip()[:_MAX_REASON_CHARACTERS]
        raise refusal(output, f"cannot be followed: {reason}") from None


def _call_constraint(tools: Tools, output: OutputConstraint) -> Constraint | None:
    callable_ = set(tools.names)
    functions = [
        {**function, "parameters": with_an_end(function.get("parameters"))}
        for function in json.loads(tools.functions)
        if function["name"] in callable_
    ]
    if not functions:
        return output.constraint
    free = tools.choice == "auto"
    named = not free and tools.choice != "required"
    if named:
        functions = [function for function in functions if function["name"] == tools.choice]
    schema = None
    if output.constraint is not None:
        options = {**with_an_end(json.loads(output.constraint.text)), "x-guidance": ONE_LINE}
        schema = json.dumps(options)
    grammar = chat_format.call_grammar(
        chat_format.STYLES[output.style],
        functions,
        several=tools.parallel and not named,
        free=free,
        trigger=output.trigger,
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
    rules = {_LARK: grammar} if plain else json.loads(grammar)["grammars"][0]
    answer = {**rules, "name": "answer"}
    free = f'start: thoughts /\\n{{0,2}}/ @answer\nthoughts[lazy]: /(.|\\n)*/ "{THOUGHT}"'
    return json.dumps({"grammars": [{_LARK: free}, answer]})
