"""Where a request goes: local engines and offers in, a decision with its reasons out.  Pure.

Every candidate that may serve it gets a score from 0 to 1, larger is better:

    score = (price x cheapest/own + time x fastest/own + reputation x own) / sum of the weights

- price: what the request would cost there, all of its `max_tokens` made, in 10^-9 of the currency.
  If the cheapest is free, whoever is not gets 0 for it.
- time: milliseconds to the first token that are to be expected, each plus `FLOOR_MS` so that
  ratios of tiny times say little: round trip + median time to the first token measured there
  lately, and if nothing is free, the wait: requests ahead / sequences x the time of
  `TYPICAL_TOKENS` tokens. Requests that we sent since the offer was made count as ahead.
- reputation: our own opinion, 0 to 1.

It is exact about what was said: integers in, doubles out.  But an offer is up to one period old,
the wait is an estimate, and nobody promises anything: a box that is full says so, and the next is
tried.

What is `known` is a round trip old, and those that are known are compared first (`unsure` says when
to ask).  Everybody sees much the same offers, some seconds old.  If everybody took the best of
them, all would go to the same box and wait there, so chance has a part (Mitzenmacher, "How Useful
Is Old Information?", 2000): of many peers `DRAWN` are compared, and of those within `BAND` of the
best (`KNOWN_BAND` if it is known) two are drawn, of which the one with the larger share of its
sequences free is taken.  `cheapest` compares all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from msgspec import Struct

from pinaivu_box.config import RoutingPolicy
from pinaivu_box.gossip.adverts import ModelLoad

FLOOR_MS = 100.0
TYPICAL_TOKENS = 256
BAND = 0.8  # of the best score
KNOWN_BAND = 0.99
AFFINITY_BAND = 0.5  # a warm cache is worth that much
DRAWN = 16  # peers that are compared
SHOWN = 8  # candidates in a decision's record
_UNKNOWN_RTT_MS = 100.0
MAX_HEADER = 200  # characters


@dataclass(frozen=True)
class Weights:
    price: float = 0.4
    time: float = 0.3
    reputation: float = 0.3


_DEFAULT = Weights()


@dataclass(frozen=True)
class Candidate:
    """An engine here (`local`) or a peer's offer of one model.

    `cost` of this request in 10^-9 of `currency`.  `rtt_ms` None: there is no link yet.  `sent`:
    requests of ours that it has not answered and that its offer did not count.  `known`: its load
    is of this moment, not of its advert.  `warm`: it served this conversation lately.  `resting`:
    why it is left alone for now.  `gone`: others lost their links to it, or there is none and
    nobody linked with it is known, so it is asked last.  `refuses`: what else speaks against it.
    """

    node_id: str
    model: str
    digest: str
    sequences: int
    load: ModelLoad
    ttft_ms: float
    tokens_per_s: float
    cost: int
    currency: str
    reputation: float = 1.0
    rtt_ms: float | None = 0.0
    sent: int = 0
    local: bool = False
    known: bool = False
    warm: bool = False
    draining: bool = False
    gone: bool = False
    resting: str | None = None
    refuses: str | None = None

    def starts_at_once(self, tokens: int) -> bool:
        """Whether a request of so many tokens (prompt and answer) would not wait."""
        load = self.load
        return load.sequences_free > self.sent and load.queue == 0 and load.kv_free >= tokens

    @property
    def idle(self) -> float:
        """The share of its sequences that are free."""
        return max(0, self.load.sequences_free - self.sent) / max(1, self.sequences)

    def expected_ms(self, tokens: int) -> float:
        """To the first token."""
        rtt = _UNKNOWN_RTT_MS if self.rtt_ms is None else self.rtt_ms
        if self.starts_at_once(tokens):
            return rtt + self.ttft_ms
        ahead = max(1, self.load.queue + 1 + self.sent - self.load.sequences_free)
        turn_ms = 1000 * TYPICAL_TOKENS / max(1.0, self.tokens_per_s)
        return rtt + self.ttft_ms + ahead * turn_ms / max(1, self.sequences)


@dataclass(frozen=True)
class RoutingRequest:
    """What is to be served.

    With `digest` None the model is not here, so any file with its name will do.  `local_only`: it
    may not leave the box.  `tried`: node ids that have failed it already.
    """

    model: str
    digest: str | None
    tokens: int
    currency: str
    policy: RoutingPolicy = "prefer-local"
    same_name: bool = False
    local_only: bool = False
    tried: Collection[str] = ()


class ScoredCandidate(Struct, frozen=True, omit_defaults=True):
    """A candidate in a decision.  `why_not` is set if it could not serve the request."""

    node_id: str
    score: float = 0.0
    cost: int = 0
    expected_ms: int = 0
    why_not: str | None = None

    def record(self) -> dict[str, Any]:
        if self.why_not:
            return {"node_id": self.node_id, "why_not": self.why_not}
        return {
            "node_id": self.node_id,
            "score": round(self.score, 4),
            "cost": str(self.cost),
            "expected_ms": self.expected_ms,
        }


class Decision(Struct, frozen=True):
    """`node_id` None: nobody can.  All candidates, best first; who is ineligible comes last."""

    node_id: str | None
    reason: str
    policy: str
    candidates: tuple[ScoredCandidate, ...]

    @property
    def eligible(self) -> int:
        return sum(candidate.why_not is None for candidate in self.candidates)

    def record(self) -> dict[str, Any]:
        """For the receipt's `routing`: JSON.  At most `SHOWN` candidates, the chosen one among
        them; the others are counted by why they were not eligible."""
        ranked = sorted(self.candidates, key=lambda candidate: candidate.node_id != self.node_id)
        best = {candidate.node_id for candidate in ranked[:SHOWN]}
        top = [candidate for candidate in self.candidates if candidate.node_id in best]
        others = [candidate for candidate in self.candidates if candidate.node_id not in best]
        return {
            "chosen": self.node_id,
            "reason": self.reason,
            "policy": self.policy,
            "eligible": self.eligible,
            "candidates": [candidate.record() for candidate in top],
            "left_out": dict(Counter(candidate.why_not or "scored less" for candidate in others)),
        }

    def header(self) -> str:
        """For `x-pinaivu-route`: ASCII, at most `MAX_HEADER` characters."""
        scores_there = (
            candidate.score for candidate in self.candidates if candidate.node_id == self.node_id
        )
        score = next(scores_there, 0.0)
        return (
            f"{self.node_id or 'none'}; reason={self.reason}; score={score:.4f}; "
            f"eligible={self.eligible}; policy={self.policy}"
        )[:MAX_HEADER]

    def why_nobody(self) -> str:
        """For a 503: how many boxes cannot, for which reason, the most frequent first."""
        reasons = Counter(candidate.why_not for candidate in self.candidates if candidate.why_not)
        phrases = [f"{count} {why}" for why, count in reasons.most_common()]
        if not phrases:
            return "no box offers it"
        return "of those that were considered " + "; ".join(phrases)


_Pair = tuple[ScoredCandidate, Candidate]
_Judged = tuple[Candidate, str | None]  # and why it may not serve the request


def why_not(candidate: Candidate, ask: RoutingRequest) -> str | None:
    """Why a candidate may not serve the request, in a few words; None if it may."""
    if candidate.model != ask.model:
        return "has another model"
    if ask.digest is not None and candidate.digest != ask.digest and not ask.same_name:
        return "has another file under that name"
    if candidate.node_id in ask.tried:
        return "was tried already"
    if candidate.draining:
        return "is draining"
    if candidate.refuses:
        return candidate.refuses
    if candidate.local:
        return None
    if ask.local_only:
        return "is not this box, and the key is for this box only"
    if ask.policy == "never":
        return "is not this box, and the policy is never to send"
    if candidate.resting:
        return candidate.resting
    if candidate.currency != ask.currency:
        return f"asks for {candidate.currency}, not {ask.currency}"
    return None


def scores(
    eligible: Sequence[Candidate], ask: RoutingRequest, weights: Weights
) -> list[ScoredCandidate]:
    """In the order given."""
    if not eligible:
        return []
    times = [candidate.expected_ms(ask.tokens) for candidate in eligible]
    cheapest, fastest = min(candidate.cost for candidate in eligible), min(times) + FLOOR_MS
    total = weights.price + weights.time + weights.reputation
    scored = []
    for candidate, ms in zip(eligible, times, strict=True):
        price = 1.0 if candidate.cost == cheapest else cheapest / candidate.cost
        weighed = (
            weights.price * price
            + weights.time * fastest / (ms + FLOOR_MS)
            + weights.reputation * min(1.0, max(0.0, candidate.reputation))
        )
        score = weighed / total if total else 1.0
        scored.append(ScoredCandidate(candidate.node_id, score, candidate.cost, round(ms)))
    return scored


def route(
    candidates: Sequence[Candidate],
    ask: RoutingRequest,
    random: Random,
    weights: Weights = _DEFAULT,
) -> Decision:
    """The same candidates, request and state of `random` give the same decision."""
    ordered = sorted(candidates, key=lambda candidate: (candidate.node_id, candidate.digest))
    judged = _draw([(candidate, why_not(candidate, ask)) for candidate in ordered], ask, random)
    eligible = [candidate for candidate, why in judged if why is None]
    refused = [
        ScoredCandidate(candidate.node_id, why_not=why)
        for candidate, why in judged
        if why is not None
    ]
    scored = scores(eligible, ask, weights)
    pairs = sorted(zip(scored, eligible, strict=True), key=lambda pair: -pair[0].score)
    chosen, reason = _choose(pairs, ask, random)
    ranked = (*(score for score, _ in pairs), *refused)
    return Decision(chosen, reason, ask.policy, ranked)


def unsure(decision: Decision, candidates: Sequence[Candidate], ask: RoutingRequest) -> bool:
    """Whether to ask around and decide anew: it would leave this box or wait, and of somebody who
    may serve it only an offer is known."""
    return decision.reason not in ("local", "warm") and any(
        not candidate.known and why_not(candidate, ask) is None for candidate in candidates
    )


def _draw(judged: list[_Judged], ask: RoutingRequest, random: Random) -> list[_Judged]:
    """The same, where most of many peers are not considered.  Those that are called gone go first,
    and who is known or warm stays."""
    stay = {
        candidate.node_id
        for candidate, _ in judged
        if candidate.local or candidate.warm or candidate.known
    }
    peers = [
        candidate
        for candidate, why in judged
        if not (why or candidate.gone or candidate.node_id in stay)
    ]
    if len(peers) <= DRAWN or ask.policy == "cheapest":
        return judged
    stay |= {candidate.node_id for candidate in random.sample(peers, DRAWN)}
    return [
        (candidate, why or (None if candidate.node_id in stay else "was not drawn"))
        for candidate, why in judged
    ]


def _choose(pairs: list[_Pair], ask: RoutingRequest, random: Random) -> tuple[str | None, str]:
    """`pairs`: who is eligible, best first.  The node, and the reason in one word."""
    if not pairs:
        return None, "nobody"
    if ask.policy == "prefer-local":
        for _, candidate in pairs:
            if candidate.local and candidate.starts_at_once(ask.tokens):
                return candidate.node_id, "local"
    pool = [pair for pair in pairs if not pair[1].gone] or pairs
    if ask.policy == "cheapest":
        cheapest = min(candidate.cost for _, candidate in pool)
        pool = [pair for pair in pool if pair[1].cost == cheapest]
    best = pool[0][0].score
    for score, candidate in pool:
        affine = candidate.warm and score.score >= AFFINITY_BAND * best
        if affine and candidate.starts_at_once(ask.tokens):
            return candidate.node_id, "warm"
    near = KNOWN_BAND if pool[0][1].known else BAND
    band = [pair for pair in pool if pair[0].score >= near * best]
    if len(band) == 1:
        return band[0][1].node_id, "best"
    drawn = [band[at] for at in sorted(random.sample(range(len(band)), 2))]
    return max(drawn, key=lambda pair: pair[1].idle)[1].node_id, "two-choices"
