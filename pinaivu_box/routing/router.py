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

What is `known` is a round trip old, and those that are known are compared first; `Decision.unsure`
says when to ask.  Everybody sees much the same offers, some seconds old.  If everybody took the
best of them, all would go to the same box and wait there, so chance has a part (Mitzenmacher, "How
Useful Is Old Information?", 2000): of many peers `DRAWN` are compared, and of those within `BAND`
of the best (`KNOWN_BAND` if it is known) two are drawn, of which the one with the larger share of
its sequences free is taken.  `cheapest` compares all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, NamedTuple

from pinaivu_box.gossip.adverts import ModelLoad
from pinaivu_box.peering_config import RoutingPolicy

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
class Destination:
    """A peer and its offer of a model; `prices` of 1,000 tokens (prompt, cached, completion).
    `of_upstream`: the peer has the model from an upstream."""

    node_id: str
    name: str
    digest: str
    prices: tuple[str, str, str]
    currency: str
    pays_prompt: bool = True
    of_upstream: bool = False


@dataclass(frozen=True, eq=False)  # a key of dictionaries: hashing all fields takes long
class Candidate:
    """An engine here (`local`), a peer's offer of one model, or one of an `upstream` of that name.

    `cost` of this request in 10^-9 of `currency`, `max_cost` its upper bound.  `rtt_ms` None: there
    is no link yet.  `sent`: requests of ours that it has not answered and that its offer did not
    count.  `known`: its load is of this moment, not of its advert.  `warm`: it served this
    conversation lately.  `tripped`: why it is left alone for now.  `gone`: others lost their links
    to it, or there is none and nobody linked with it is known, so it is asked last.  `refuses`:
    what else speaks against it.  `cpu_variant` is that of its library for the CPU, if it says so.
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
    cpu_variant: str = ""
    local: bool = False
    known: bool = False
    warm: bool = False
    draining: bool = False
    gone: bool = False
    tripped: str | None = None
    refuses: str | None = None
    max_cost: int = 0
    destination: Destination | None = None  # of a peer
    upstream: str = ""

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
    may not leave the box.  `tried`: node ids that have failed it already.  `weights`: of price,
    time and reputation.  `exactness`: that of an earlier leg, which a box of the same variant goes
    on with to the bit.
    """

    model: str
    digest: str | None
    tokens: int
    currency: str
    policy: RoutingPolicy = "prefer-local"
    same_name: bool = False
    local_only: bool = False
    tried: Collection[str] = ()
    weights: tuple[float, float, float] = (0.4, 0.3, 0.3)
    exactness: str = ""

    def has_same_bits(self, candidate: Candidate) -> bool:
        """Whether the candidate should make the very tokens that the earlier leg would have."""
        variant = candidate.cpu_variant
        return bool(variant) and self.exactness.startswith(f"bitwise:{variant} ")


class ScoredCandidate(NamedTuple):
    """A candidate in a decision.  `why_not` is set if it could not serve the request."""

    candidate: Candidate
    score: float = 0.0
    expected_ms: int = 0
    why_not: str | None = None

    @property
    def node_id(self) -> str:
        return self.candidate.node_id

    def record(self) -> dict[str, Any]:
        if self.why_not:
            return {"node_id": self.node_id, "why_not": self.why_not}
        return {
            "node_id": self.node_id,
            "score": round(self.score, 4),
            "cost": str(self.candidate.cost),
            "expected_ms": self.expected_ms,
        }


@dataclass(frozen=True)
class Decision:
    """`chosen` None: nobody can.  All candidates, best first; who is ineligible comes last."""

    chosen: Candidate | None
    reason: str
    policy: str
    candidates: tuple[ScoredCandidate, ...]

    @property
    def node_id(self) -> str | None:
        return None if self.chosen is None else self.chosen.node_id

    @property
    def destination(self) -> Destination | None:
        """The peer that was chosen, if it is one."""
        return None if self.chosen is None else self.chosen.destination

    @property
    def eligible(self) -> int:
        return sum(scored.why_not is None for scored in self.candidates)

    @property
    def unsure(self) -> bool:
        """Whether to ask around and decide anew: the request would leave this box or wait, and of
        somebody who may serve it only an offer is known."""
        return self.reason not in ("local", "warm") and any(
            scored.why_not is None and not scored.candidate.known for scored in self.candidates
        )

    def record(self) -> dict[str, Any]:
        """For the receipt's `routing`: JSON.  At most `SHOWN` candidates, the chosen one among
        them; the others are counted by why they were not eligible."""
        ranked = sorted(self.candidates, key=lambda scored: scored.node_id != self.node_id)
        best = {scored.node_id for scored in ranked[:SHOWN]}
        top = [scored for scored in self.candidates if scored.node_id in best]
        others = [scored for scored in self.candidates if scored.node_id not in best]
        return {
            "chosen": self.node_id,
            "reason": self.reason,
            "policy": self.policy,
            "eligible": self.eligible,
            "candidates": [scored.record() for scored in top],
            "left_out": dict(Counter(scored.why_not or "scored less" for scored in others)),
        }

    def header(self) -> str:
        """For `x-pinaivu-route`: ASCII, at most `MAX_HEADER` characters."""
        score = next((s.score for s in self.candidates if s.node_id == self.node_id), 0.0)
        return (
            f"{self.node_id or 'none'}; reason={self.reason}; score={score:.4f}; "
            f"eligible={self.eligible}; policy={self.policy}"
        )[:MAX_HEADER]

    def why_nobody(self) -> str:
        """For a 503: how many boxes cannot, for which reason, the most frequent first."""
        reasons = Counter(scored.why_not for scored in self.candidates if scored.why_not)
        phrases = "; ".join(f"{count} {why}" for why, count in reasons.most_common())
        return f"of those that were considered {phrases}" if phrases else "no box offers it"


def why_not(candidate: Candidate, ask: RoutingRequest) -> str | None:
    """Why a candidate may not serve the request, in a few words; None if it may."""
    if candidate.model != ask.model:
        return "has another model"
    # Of an upstream the operator has said what the model is.
    has_file = candidate.upstream or ask.digest is None or candidate.digest == ask.digest
    if not has_file and not ask.same_name:
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
    if candidate.tripped:
        return candidate.tripped
    if candidate.currency != ask.currency:
        return f"asks for {candidate.currency}, not {ask.currency}"
    return None


def scores(eligible: Sequence[Candidate], ask: RoutingRequest) -> list[ScoredCandidate]:
    """In the order given."""
    if not eligible:
        return []
    times = [candidate.expected_ms(ask.tokens) for candidate in eligible]
    cheapest, fastest = min(candidate.cost for candidate in eligible), min(times) + FLOOR_MS
    price_weight, time_weight, reputation_weight = ask.weights
    total = sum(ask.weights)
    scored = []
    for candidate, ms in zip(eligible, times, strict=True):
        price = 1.0 if candidate.cost == cheapest else cheapest / candidate.cost
        weighed = (
            price_weight * price
            + time_weight * fastest / (ms + FLOOR_MS)
            + reputation_weight * min(1.0, max(0.0, candidate.reputation))
        )
        score = weighed / total if total else 1.0
        scored.append(ScoredCandidate(candidate, score, round(ms)))
    return scored


def route(candidates: Sequence[Candidate], ask: RoutingRequest, random: Random) -> Decision:
    """The same candidates, request and state of `random` give the same decision."""
    ordered = sorted(candidates, key=lambda candidate: (candidate.node_id, candidate.digest))
    reasons = {candidate: why_not(candidate, ask) for candidate in ordered}
    eligible = [candidate for candidate, why in reasons.items() if why is None]
    for candidate in _not_drawn(eligible, ask, random):
        reasons[candidate] = "was not drawn"
    compared = [candidate for candidate in eligible if reasons[candidate] is None]
    ranked = sorted(scores(compared, ask), key=lambda scored: -scored.score)
    refused = [ScoredCandidate(c, why_not=why) for c, why in reasons.items() if why is not None]
    chosen, reason = _choose(ranked, ask, random)
    return Decision(chosen, reason, ask.policy, (*ranked, *refused))


def _not_drawn(eligible: list[Candidate], ask: RoutingRequest, random: Random) -> list[Candidate]:
    """Most of many peers, which are not compared.  Those that are called gone go first, and who is
    known or warm stays."""
    peers = [c for c in eligible if not (c.local or c.warm or c.known or ask.has_same_bits(c))]
    reachable = [candidate for candidate in peers if not candidate.gone]
    if len(reachable) <= DRAWN or ask.policy == "cheapest":
        return []
    drawn = set(random.sample(reachable, DRAWN))
    return [candidate for candidate in peers if candidate not in drawn]


def _goes_on_exactly(candidate: Candidate, ask: RoutingRequest) -> bool:
    if candidate.gone or not ask.has_same_bits(candidate):
        return False
    return candidate.starts_at_once(ask.tokens)


def _choose(
    ranked: list[ScoredCandidate], ask: RoutingRequest, random: Random
) -> tuple[Candidate | None, str]:
    """`ranked`: who is eligible, best first.  Returns the one, and the reason in one word."""
    if not ranked:
        return None, "nobody"
    # Who goes on with the same bits, unless the request would have to wait for that.
    same = [scored for scored in ranked if _goes_on_exactly(scored.candidate, ask)]
    ranked = same or ranked
    if ask.policy == "prefer-local":
        for scored in ranked:
            if scored.candidate.local and scored.candidate.starts_at_once(ask.tokens):
                return scored.candidate, "local"
    pool = [scored for scored in ranked if not scored.candidate.gone] or ranked
    if ask.policy == "cheapest":
        cheapest = min(scored.candidate.cost for scored in pool)
        pool = [scored for scored in pool if scored.candidate.cost == cheapest]
    best = pool[0].score
    for scored in pool:
        affine = scored.candidate.warm and scored.score >= AFFINITY_BAND * best
        if affine and scored.candidate.starts_at_once(ask.tokens):
            return scored.candidate, "warm"
    near = KNOWN_BAND if pool[0].candidate.known else BAND
    band = [scored.candidate for scored in pool if scored.score >= near * best]
    if len(band) == 1:
        return band[0], "best"
    drawn = [band[at] for at in sorted(random.sample(range(len(band)), 2))]
    return max(drawn, key=lambda candidate: candidate.idle), "two-choices"
