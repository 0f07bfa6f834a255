"""The figures of a run, from the times of its requests."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise

import msgspec

from pinaivu_box.bench.client import RequestOutcome
from pinaivu_box.bench.run import Measured, RunPlan


class Quantiles(msgspec.Struct, frozen=True):
    """Quantiles of `n` values, in milliseconds."""

    n: int
    mean: float
    p50: float
    p95: float
    p99: float
    max: float


class TenantSummary(msgspec.Struct, frozen=True):
    """`tokens` are those that arrived within the run."""

    name: str
    clients: int
    requests: int
    errors: int
    tokens: float
    tokens_per_client: float
    ttft_ms: Quantiles | None


class IntruderSummary(msgspec.Struct, frozen=True):
    """The long prompt, and the gaps of the other streams while it was processed."""

    prompt_tokens: int
    ttft_ms: float | None
    error: str
    gap_ms: Quantiles | None


class Summary(msgspec.Struct, frozen=True):
    """The figures of a run.  Except for `errors`, only successful requests count.

    seconds           from the first request to the last end; or the requested duration, and then
                      later tokens and requests do not count for the rates
    completion_tokens as the server reports them (`usage`), or pieces of text: `tokens_from`
    ttft_ms           from before the connection is opened to the first text
    gap_ms            between two arrivals of text in a stream; one read is one arrival
    tokens_per_arrival 1.0 if every token arrived separately
    per_token_ms      of each request: (last text - first text) / (tokens - 1)
    latency_ms        from before the connection is opened to the end of the stream
    jain_per_client   Jain's index over the tenants' tokens per client: 1 if all got the same
    jain_per_tenant   the same over the tenants' tokens
    client_load       share of a core that this process used; near 1, it is the bottleneck
    """

    seconds: float
    requests: int
    errors: dict[str, int]
    error_example: str
    requests_per_s: float
    tokens_per_s: float
    completion_tokens: int
    prompt_tokens: int
    cached_tokens: int
    tokens_from: str
    tokens_per_arrival: float | None
    ttft_ms: Quantiles | None
    gap_ms: Quantiles | None
    per_token_ms: Quantiles | None
    latency_ms: Quantiles | None
    jain_per_client: float | None
    jain_per_tenant: float | None
    tenants: list[TenantSummary]
    intruder: IntruderSummary | None
    client_load: float


def percentile(ordered: Sequence[float], share: float) -> float:
    """A percentile of ascending values, interpolated linearly; `share` is from 0 to 1."""
    position = (len(ordered) - 1) * share
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def quantiles(seconds: Iterable[float]) -> Quantiles | None:
    """None if there are no values."""
    values = sorted(1000 * value for value in seconds)
    if not values:
        return None
    return Quantiles(
        n=len(values),
        mean=sum(values) / len(values),
        p50=percentile(values, 0.50),
        p95=percentile(values, 0.95),
        p99=percentile(values, 0.99),
        max=values[-1],
    )


def jain(values: Sequence[float]) -> float | None:
    """Jain's fairness index: 1 if all are equal, 1/n if one has all; None if all are 0."""
    squares = sum(value * value for value in values)
    return sum(values) ** 2 / (len(values) * squares) if squares else None


def ttft(outcome: RequestOutcome) -> float:
    """The time to the first token in seconds; the outcome must have arrivals."""
    return outcome.arrivals[0] - outcome.started


def gaps(outcome: RequestOutcome) -> list[float]:
    """The seconds between arrivals."""
    return [later - earlier for earlier, later in pairwise(outcome.arrivals)]


def succeeded(measured: Measured) -> list[RequestOutcome]:
    return [outcome for outcome in measured.outcomes if not outcome.error]


def tokens_until(outcome: RequestOutcome, end: float) -> float:
    """The tokens that arrived until `end`, if all pieces of text have the same length."""
    pieces = sum(outcome.deltas)
    if outcome.ended <= end or not pieces:
        return float(outcome.tokens if outcome.ended <= end else 0)
    came = sum(n for at, n in zip(outcome.arrivals, outcome.deltas, strict=True) if at <= end)
    return outcome.tokens * came / pieces


def summarise(measured: Measured, plan: RunPlan) -> Summary:
    good = succeeded(measured)
    bad = [outcome for outcome in measured.outcomes if outcome.error]
    seconds = max(measured.end - measured.begin, 1e-9)
    tenants = [_tenant(number, measured, plan) for number in range(len(plan.tenants))]
    arrived = sum(len(outcome.arrivals) for outcome in good)
    several = len(tenants) > 1
    return Summary(
        seconds=seconds,
        requests=len(good),
        errors=dict(Counter(outcome.error for outcome in bad).most_common()),
        error_example=next((outcome.detail for outcome in bad if outcome.detail), ""),
        requests_per_s=sum(1 for outcome in good if outcome.ended <= measured.end) / seconds,
        tokens_per_s=sum(tokens_until(outcome, measured.end) for outcome in good) / seconds,
        completion_tokens=sum(outcome.tokens for outcome in good),
        prompt_tokens=sum(outcome.prompt_tokens for outcome in good),
        cached_tokens=sum(outcome.cached_tokens for outcome in good),
        tokens_from=_source(good),
        tokens_per_arrival=sum(outcome.tokens for outcome in good) / arrived if arrived else None,
        ttft_ms=quantiles(ttft(outcome) for outcome in good if outcome.arrivals),
        gap_ms=quantiles(gap for outcome in good for gap in gaps(outcome)),
        per_token_ms=quantiles(
            (outcome.arrivals[-1] - outcome.arrivals[0]) / (outcome.tokens - 1)
            for outcome in good
            if outcome.tokens > 1 and len(outcome.arrivals) > 1
        ),
        latency_ms=quantiles(outcome.ended - outcome.started for outcome in good),
        jain_per_client=jain([tenant.tokens_per_client for tenant in tenants]) if several else None,
        jain_per_tenant=jain([tenant.tokens for tenant in tenants]) if several else None,
        tenants=tenants if several else [],
        intruder=_intruder(measured),
        client_load=measured.client_load,
    )


def _source(good: list[RequestOutcome]) -> str:
    kinds = {"deltas" if outcome.usage_tokens is None else "usage" for outcome in good}
    return " and ".join(sorted(kinds)) or "nothing"


def _tenant(number: int, measured: Measured, plan: RunPlan) -> TenantSummary:
    tenant = plan.tenants[number]
    own = [outcome for outcome in measured.outcomes if outcome.tenant == number]
    good = [outcome for outcome in own if not outcome.error]
    tokens = sum(tokens_until(outcome, measured.end) for outcome in good)
    return TenantSummary(
        name=tenant.name,
        clients=tenant.clients,
        requests=len(good),
        errors=len(own) - len(good),
        tokens=tokens,
        tokens_per_client=tokens / tenant.clients,
        ttft_ms=quantiles(ttft(outcome) for outcome in good if outcome.arrivals),
    )


def _intruder(measured: Measured) -> IntruderSummary | None:
    intruder = measured.intruder
    if intruder is None:
        return None
    begin, end = intruder.started, intruder.arrivals[0] if intruder.arrivals else intruder.ended
    # The gaps that overlap the time from the start of the long prompt to its first token.
    meanwhile = [
        later - earlier
        for other in succeeded(measured)
        for earlier, later in pairwise(other.arrivals)
        if later > begin and earlier < end
    ]
    return IntruderSummary(
        prompt_tokens=intruder.prompt_tokens,
        ttft_ms=1000 * ttft(intruder) if intruder.arrivals and not intruder.error else None,
        error=intruder.detail or intruder.error,
        gap_ms=quantiles(meanwhile),
    )
