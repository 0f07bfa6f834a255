"""Outputs that must follow a grammar: masks over the vocabulary, by llguidance.

A token is drawn without the grammar first.  If the grammar allows it, it stands; otherwise the
logits of all that is not allowed become minus infinity and it is drawn again, with the same noise
(llama.cpp does the same: `common_sampler_sample`).  So most steps cost one look-up, and no mask.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from llguidance.gbnf_to_lark import any_to_lark

from pinaivu_box.chat_format import ONE_LINE, THOUGHT
from pinaivu_box.engine.messages import Constraint
from pinaivu_box.engine.number_bounds import with_an_end
from pinaivu_box.engine.runner import Runner
from pinaivu_box.errors import InvalidBody

_LARK = "lark_grammar"
_LIMITS = LLParserLimits(verbose_errors=False)  # an error must not quote what somebody asked


class Grammar:
    """One sequence's place in its grammar."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    @property
    def done(self) -> bool:
        """Nothing can follow."""
        return self._matcher.is_stopped()

    @property
    def broken(self) -> bool:
        """It was too complex for its limits."""
        return self._matcher.is_error()

    def allows(self, token: int) -> bool:
        return self._matcher.validate_tokens([token]) == 1

    def mask(self, row: npt.NDArray[np.float32]) -> None:
        """Ban what is not allowed, in place."""
        packed = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        allowed = np.unpackbits(packed, count=len(row), bitorder="little")
        row[allowed == 0] = -np.inf

    def take(self, token: int) -> None:
        self._matcher.consume_token(token)

    def forced(self) -> list[int]:
        """Tokens that must come next; often there are none."""
        return [] if self.done else list(self._matcher.compute_ff_tokens())


class Grammars:
    """Makes grammars for one model's vocabulary, in any thread: llguidance holds no lock of ours
    meanwhile.  To be made once: for a large vocabulary that takes a second."""

    def __init__(self, runner: Runner) -> None:
        ends = sorted(runner.facts.end_tokens)
        self._tokenizer = LLTokenizer(
            TokenizerWrapper(_Vocabulary(runner, ends)),
            n_vocab=runner.facts.n_vocab,
            eos_token=ends,
        )

    def make(self, constraint: Constraint, param: str, *, thinking: bool = False) -> Grammar:
        """Raises InvalidBody, which blames `param`, for what is no grammar, or none that can be
        followed.  With `thinking` the output begins inside the model's thoughts, which are free."""
        try:
            text = _compiled(constraint)
        except Exception as error:  # the converter of GBNF raises nothing more special
            raise _refusal(constraint, param, str(error)) from None
        if thinking:
            text = _after_thoughts(constraint.kind, text)
        reason = LLMatcher.validate_grammar(text, self._tokenizer, limits=_LIMITS)
        if reason and not reason.startswith("WARNING"):
            raise _refusal(constraint, param, reason)
        return Grammar(LLMatcher(self._tokenizer, text, log_level=0, limits=_LIMITS))


class _Vocabulary:
    """What llguidance wants to know."""

    bos_token_id = None

    def __init__(self, runner: Runner, ends: list[int]) -> None:
        self.eos_token_id = ends[0]
        self.tokens: list[bytes] = []
        self.special_token_ids: list[int] = []
        for token in range(runner.facts.n_vocab):
            piece = runner.piece(token)
            if not piece or token in runner.facts.end_tokens:
                self.special_token_ids.append(token)
                piece = b"<[%d]>" % token  # only its number names it
            self.tokens.append(piece)
        self._tokenize: Callable[[str], list[int]] = runner.tokenize_text

    def __call__(self, text: bytes | str) -> list[int]:
        return self._tokenize(text.decode(errors="replace") if isinstance(text, bytes) else text)


def _compiled(constraint: Constraint) -> str:
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


def _refusal(constraint: Constraint, param: str, reason: str) -> InvalidBody:
    what = "JSON schema" if constraint.kind == "json_schema" else "grammar"
    return InvalidBody(f"this {what} cannot be followed: {reason.strip()}", loc=("body", param))
