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

from pinaivu_box.bounded import BoundedDict
from pinaivu_box.engine.grammar_validation import (
    LIMITS,
    GrammarVocabulary,
    OutputConstraint,
    compute_first_mask,
    refusal,
    tokenizer_of,
)
from pinaivu_box.engine.runner import Runner
from pinaivu_box.engine.sandboxes import Sandboxes, SandboxRun
from pinaivu_box.errors import InvalidBody
from pinaivu_box.sandbox import Cancellation, SandboxLimit

# What a tenant's grammars may take of the steps' CPU time: each token earns some, and each second
# some more.  Most tokens take less than a tenth of that.
_EARNED_PER_TOKEN_SECONDS = 0.005
_EARNED_PER_SECOND = 0.02
_MAX_SAVED_SECONDS = 0.2

_MAX_BUDGETS = 1000  # tenants whose budgets are kept

# Of compiled grammars, by the length of their text; in memory they are a hundred times larger.
_MAX_CACHE_BYTES, _MAX_TENANT_BYTES = 2 << 20, 1 << 20
_MIN_ENTRY_BYTES = 64 << 10  # a shorter one counts as much


class CpuBudget:
    """CPU time that a tenant's grammars may still take of the steps."""

    def __init__(self) -> None:
        self._left = _MAX_SAVED_SECONDS
        self._since = time.monotonic()

    @property
    def exhausted(self) -> bool:
        return self._left <= 0

    @property
    def ample(self) -> bool:
        """Whether more than half of what can be saved is left."""
        return self._left > _MAX_SAVED_SECONDS / 2

    def spend(self, seconds: float) -> None:
        now = time.monotonic()
        earned = (now - self._since) * _EARNED_PER_SECOND
        self._since = now
        self._left = min(_MAX_SAVED_SECONDS, self._left + earned - seconds)

    def earn(self) -> None:
        self._left = min(_MAX_SAVED_SECONDS, self._left + _EARNED_PER_TOKEN_SECONDS)


class Unbounded(CpuBudget):
    """One of which nothing is ever spent."""

    def spend(self, seconds: float) -> None:
        return None


class Grammar:
    """One sequence's place in its grammar.  Its tenant's grammars share a `budget`: a few that are
    each just cheap enough would hold up all others' steps as well."""

    def __init__(self, matcher: LLMatcher, budget: CpuBudget) -> None:
        self._matcher = matcher
        self._budget = budget

    def drop_budget(self) -> None:
        """For an answer that is computed again: it was followed within a budget before."""
        self._budget = Unbounded()

    @property
    def done(self) -> bool:
        """Nothing can follow."""
        return self._matcher.is_stopped()

    @property
    def broken(self) -> bool:
        """It was too complex for its limits, or takes too long."""
        return self._budget.exhausted or self._matcher.is_error()

    @property
    def has_time(self) -> bool:
        """Whether there is time for what is not necessary: drafts must never exhaust the budget."""
        return self._budget.ample and not self.broken

    def allows(self, token: int) -> bool:
        began = time.thread_time()
        allowed = self._matcher.validate_tokens([token]) == 1
        self._budget.spend(time.thread_time() - began)
        return allowed

    def mask(self, row: npt.NDArray[np.float32]) -> None:
        """Ban what is not allowed, in place."""
        began = time.thread_time()
        packed = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._budget.spend(time.thread_time() - began)
        allowed = np.unpackbits(packed, count=len(row), bitorder="little")
        row[allowed == 0] = -np.inf

    def take(self, token: int) -> None:
        began = time.thread_time()
        self._matcher.consume_token(token)
        self._budget.spend(time.thread_time() - began)
        self._budget.earn()

    def try_out(self, token: int) -> None:
        """As `take`, for a token that is only drafted: `take_back` follows."""
        began = time.thread_time()
        self._matcher.consume_token(token)
        self._budget.spend(time.thread_time() - began)

    def take_back(self, count: int) -> None:
        """Go back to before the last `count` tokens."""
        began = time.thread_time()
        self._matcher.rollback(count)
        self._budget.spend(time.thread_time() - began)

    def forced(self) -> list[int]:
        """Tokens that must come next; often there are none."""
        if self.done or self.broken:
            return []
        began = time.thread_time()
        tokens = list(self._matcher.compute_ff_tokens())
        self._budget.spend(time.thread_time() - began)
        return tokens


class GrammarCompiler:
    """Compiles grammars for one model's vocabulary, in any thread.  To be made once: for a large
    vocabulary that takes a second.

    A grammar is validated in a sandbox before it is compiled here.  A tenant's last ones are
    cached, with the refusals; never another tenant's, which would tell who has sent what before.
    """

    def __init__(self, runner: Runner, sandboxes: Sandboxes) -> None:
        vocabulary = _vocabulary(runner)
        self._tokenizer = tokenizer_of(vocabulary, runner.tokenize_text)
        self._validate: SandboxRun = sandboxes.grammars(msgspec.msgpack.encode(vocabulary))
        self._cache = _GrammarCache()
        # A budget that is dropped has earned all by now.
        self._budgets: BoundedDict[str, CpuBudget] = BoundedDict(_MAX_BUDGETS)
        self._lock = threading.Lock()

    def compile(
        self, constraint: OutputConstraint, tenant: str, cancellation: Cancellation | None
    ) -> Grammar | None:
        """Returns None if everything is allowed.  Raises InvalidBody for what is no grammar, or
        none that can be followed within the limits; SandboxCancelled."""
        payload = msgspec.msgpack.encode(constraint)
        key = _Key(tenant, hashlib.sha256(payload).digest())
        with self._lock:
            entry = self._cache.get(key)
        if entry is None:
            entry = self._compile(constraint, payload, cancellation)
            with self._lock:
                self._cache.put(key, entry)
        compiled, _ = entry
        if isinstance(compiled, InvalidBody):
            raise InvalidBody(compiled.message, loc=compiled.loc, kind=compiled.kind)
        if compiled is None:
            return None
        with self._lock:  # the cached matcher must not be copied twice at the same time
            return Grammar(compiled.deep_copy(), self._budget(tenant))

    def _compile(
        self, constraint: OutputConstraint, payload: bytes, cancellation: Cancellation | None
    ) -> _Entry:
        try:
            text = self._validate(payload, cancellation).decode()
        except SandboxLimit as error:
            return refusal(constraint, f"{error.reason} to compile: make it smaller"), 0
        except InvalidBody as error:
            return error, 0
        if not text:
            return None, 0
        matcher = LLMatcher(self._tokenizer, text, log_level=0, limits=LIMITS)
        compute_first_mask(matcher)
        if matcher.is_error():
            return refusal(constraint, "is too complex to follow: simplify it"), 0
        return matcher, len(text)

    def _budget(self, tenant: str) -> CpuBudget:
        budget = self._budgets[tenant] = self._budgets.get(tenant) or CpuBudget()
        return budget


# A grammar or its refusal, None if everything is allowed; and the length of the grammar's text.
_Entry = tuple[LLMatcher | InvalidBody | None, int]


class _Key(NamedTuple):
    tenant: str
    digest: bytes


class _GrammarCache:
    """The last used ones; the tenant with the largest share loses its oldest first."""

    def __init__(self) -> None:
        self._entries: OrderedDict[_Key, _Entry] = OrderedDict()

    def get(self, key: _Key) -> _Entry | None:
        if key in self._entries:
            self._entries.move_to_end(key)
        return self._entries.get(key)

    def put(self, key: _Key, entry: _Entry) -> None:
        self._entries[key] = entry
        self._entries.move_to_end(key)
        while self._entries:
            sizes: Counter[str] = Counter()
            for (tenant, _), (_, text_bytes) in self._entries.items():
                sizes[tenant] += text_bytes + _MIN_ENTRY_BYTES
            tenant, largest = sizes.most_common(1)[0]
            if largest <= _MAX_TENANT_BYTES and sizes.total() <= _MAX_CACHE_BYTES:
                return
            del self._entries[next(old for old in self._entries if old.tenant == tenant)]


def _vocabulary(runner: Runner) -> GrammarVocabulary:
    ends = sorted(runner.facts.end_tokens)
    tokens, special = [], []
    for token in range(runner.facts.n_vocab):
        piece = runner.piece(token)
        if not piece or token in runner.facts.end_tokens:
            special.append(token)
            piece = b"<[%d]>" % token  # only its number names it
        tokens.append(piece)
    return GrammarVocabulary(tokens, special, ends)
