"""Outputs that must follow a grammar: masks over the vocabulary, by llguidance.

A token is drawn without the grammar first.  If the grammar allows it, it stands; otherwise the
logits of all that is not allowed become minus infinity and it is drawn again, with the same noise
(llama.cpp does the same: `common_sampler_sample`).  So most steps cost one look-up, and no mask.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections import Counter, OrderedDict
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher

from pinaivu_box.engine.grammar_validation import (
    LIMITS,
    OutputConstraint,
    Vocabulary,
    begin,
    refusal,
    tokenizer_of,
)
from pinaivu_box.engine.runner import Runner
from pinaivu_box.engine.sandboxes import Sandboxes, SandboxRun, reached
from pinaivu_box.errors import InvalidBody
from pinaivu_box.sandbox import Cancellation, SandboxLimit

# What a tenant's grammars may take of the steps' CPU time: each token earns some, and time some
# more (a share of it).  Most tokens take less than a tenth of that.
_PER_TOKEN_SECONDS = 0.005
_SHARE = 0.02
_SAVED_SECONDS = 0.2

_TENANTS = 1000  # whose allowances are kept

# Of compiled grammars, by the length of their text; in memory they are a hundred times larger.
_KEPT_BYTES, _KEPT_OF_TENANT = 2 << 20, 1 << 20
_KEPT_AT_LEAST = 64 << 10  # what a short one counts


class CpuBudget:
    """CPU time that a tenant's grammars may still take of the steps."""

    def __init__(self) -> None:
        self._left = _SAVED_SECONDS
        self._since = time.monotonic()

    @property
    def used_up(self) -> bool:
        return self._left <= 0

    def spend(self, seconds: float) -> None:
        now = time.monotonic()
        earned = (now - self._since) * _SHARE
        self._since = now
        self._left = min(_SAVED_SECONDS, self._left + earned - seconds)

    def earn(self) -> None:
        self._left = min(_SAVED_SECONDS, self._left + _PER_TOKEN_SECONDS)


class Grammar:
    """One sequence's place in its grammar.  Its tenant's grammars share an `allowance`: a few that
    are each just cheap enough would hold up all others' steps as well."""

    def __init__(self, matcher: LLMatcher, allowance: CpuBudget) -> None:
        self._matcher = matcher
        self._allowance = allowance

    @property
    def done(self) -> bool:
        """Nothing can follow."""
        return self._matcher.is_stopped()

    @property
    def broken(self) -> bool:
        """It was too complex for its limits, or takes too long."""
        return self._allowance.used_up or self._matcher.is_error()

    def allows(self, token: int) -> bool:
        began = time.thread_time()
        allowed = self._matcher.validate_tokens([token]) == 1
        self._allowance.spend(time.thread_time() - began)
        return allowed

    def mask(self, row: npt.NDArray[np.float32]) -> None:
        """Ban what is not allowed, in place."""
        began = time.thread_time()
        packed = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._allowance.spend(time.thread_time() - began)
        allowed = np.unpackbits(packed, count=len(row), bitorder="little")
        row[allowed == 0] = -np.inf

    def take(self, token: int) -> None:
        began = time.thread_time()
        self._matcher.consume_token(token)
        self._allowance.spend(time.thread_time() - began)
        self._allowance.earn()

    def forced(self) -> list[int]:
        """Tokens that must come next; often there are none."""
        if self.done or self.broken:
            return []
        began = time.thread_time()
        tokens = list(self._matcher.compute_ff_tokens())
        self._allowance.spend(time.thread_time() - began)
        return tokens


class GrammarCompiler:
    """Makes grammars for one model's vocabulary, in any thread.  To be made once: for a large
    vocabulary that takes a second.

    A grammar is tried in a sandbox before it is compiled here.  A tenant's last ones are kept, also
    what they were refused for; never another tenant's, which would tell who has sent what before.
    """

    def __init__(self, runner: Runner, sandboxes: Sandboxes) -> None:
        vocabulary = _vocabulary(runner)
        self._tokenizer = tokenizer_of(
            vocabulary,
            lambda text: runner.tokenize_text(
                text.decode(errors="replace") if isinstance(text, bytes) else text
            ),
        )
        self._try: SandboxRun = sandboxes.trials(msgspec.msgpack.encode(vocabulary))
        self._kept = _Kept()
        self._allowances: dict[str, CpuBudget] = {}
        self._lock = threading.Lock()

    def make(
        self,
        wanted: OutputConstraint,
        *,
        tenant: str = "",
        cancellation: Cancellation | None = None,
    ) -> Grammar | None:
        """None if everything is allowed.  Raises InvalidBody for what is no grammar, or none that
        can be followed within the limits; SandboxCancelled."""
        payload = msgspec.msgpack.encode(wanted)
        key = _Key(tenant, hashlib.sha256(payload).digest())
        with self._lock:
            found = self._kept.get(key)
        if found is None:
            found, size = self._compile(wanted, payload, tenant, cancellation)
            with self._lock:
                self._kept.put(key, found, size)
        if isinstance(found, InvalidBody):
            raise InvalidBody(found.message, loc=found.loc, kind=found.kind)
        if isinstance(found, _Anything):
            return None
        with self._lock:  # a copy is of what nobody changes meanwhile
            return Grammar(found.deep_copy(), self._allowance(tenant))

    def _compile(
        self,
        wanted: OutputConstraint,
        payload: bytes,
        tenant: str,
        cancellation: Cancellation | None,
    ) -> tuple[_Made, int]:
        try:
            text = self._try(payload, tenant=tenant, cancellation=cancellation).decode()
        except SandboxLimit as error:
            return refusal(wanted, f"{reached(error.limit)} to compile: make it smaller"), 0
        except InvalidBody as error:
            return error, 0
        if not text:
            return _Anything(), 0
        matcher = LLMatcher(self._tokenizer, text, log_level=0, limits=LIMITS)
        begin(matcher)
        if matcher.is_error():
            return refusal(wanted, "is too complex to follow: simplify it"), 0
        return matcher, len(text)

    def _allowance(self, tenant: str) -> CpuBudget:
        found = self._allowances.pop(tenant, None) or CpuBudget()
        self._allowances[tenant] = found
        if len(self._allowances) > _TENANTS:  # whose last use is so long ago has all of it again
            del self._allowances[next(iter(self._allowances))]
        return found


class _Anything:
    """There is nothing to hold."""


_Made = LLMatcher | _Anything | InvalidBody


class _Key(NamedTuple):
    tenant: str
    digest: bytes


class _Kept:
    """The last used; whose are the largest loses its oldest."""

    def __init__(self) -> None:
        self._kept: OrderedDict[_Key, tuple[_Made, int]] = OrderedDict()

    def get(self, key: _Key) -> _Made | None:
        found = self._kept.get(key)
        if found is None:
            return None
        self._kept.move_to_end(key)
        return found[0]

    def put(self, key: _Key, made: _Made, size: int) -> None:
        self._kept[key] = made, size + _KEPT_AT_LEAST
        self._kept.move_to_end(key)
        while True:
            sizes: Counter[str] = Counter()
            for one, (_, bytes_) in self._kept.items():
                sizes[one.tenant] += bytes_
            tenant, largest = sizes.most_common(1)[0]
            if largest <= _KEPT_OF_TENANT and sizes.total() <= _KEPT_BYTES:
                return
            del self._kept[next(one for one in self._kept if one.tenant == tenant)]
            if not self._kept:
                return


def _vocabulary(runner: Runner) -> Vocabulary:
    ends = sorted(runner.facts.end_tokens)
    tokens, special = [], []
    for token in range(runner.facts.n_vocab):
        piece = runner.piece(token)
        if not piece or token in runner.facts.end_tokens:
            special.append(token)
            piece = b"<[%d]>" % token  # only its number names it
        tokens.append(piece)
    return Vocabulary(tokens, special, ends)
