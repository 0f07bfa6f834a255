"""From what happened when to figures.  Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise

import msgspec

from pinaivu_box.bench.client import RequestOutcome
from pinaivu_box.bench.run import Measured, RunPlan


class Quantiles(msgspec.Struct, frozen=True):
    """Of `n` values, in milliseconds."""

    n: int
    mean: float
    p50: float
    p95: float
    p99: float
    max: float


class TenantSummary(msgspec.Struct, frozen=True):
    """`tokens` are those that came in the run's window."""

    name: str
    clients: int
    requests: int
    errors: int
    tokens: float
    tokens_per_client: float
    ttft_ms: Quantiles | None


class IntruderSummary(msgspec.Struct, frozen=True):
    """The long prompt, and the other streams' gaps while it was computed."""

    prompt_tokens: int
    ttft_ms: float | None
    error: str
    gap_ms: Quantiles | None


class Summary(msgspec.Struct, frozen=True):
    """One run.  Only requests that succeeded count, but for `errors`.

    seconds           from the first request to the last end; or the time that was asked for, and
                      then tokens and requests that ended later do not count into the rates
    completion_tokens as the servers count them (`usage`), else pieces of text: `tokens_from`
    ttft_ms           from before the connection is opened to the first text
    gap_ms            between one arrival of text and the next within a stream; what comes in one
                      read is one arrival
    tokens_per_arrival 1.0 if every token came alone
    per_token_ms      of each request: (last text - first text) / (tokens - 1)
    latency_ms        from before the connection is opened to the end of the stream
    jain_per_client   Jain's index over the tenants' tokens per client: 1 if all clients got alike
    jain_per_tenant   the same over the tenants' tokens
    client_load       share of one core that the measuring process used: near 1 it is the limit
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
    """Of values in ascending order, between two of them linearly; `share` is 0 to 1."""
    place = (len(ordered) - 1) * share
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


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
    """Jain's fairness index: 1 if all are alike, 1/n if one has all; None if nobody has any."""
    squares = sum(value * value for value in values)
    return sum(values) ** 2 / (len(values) * squares) if squares else None


def ttft(outcome: RequestOutcome) -> float:
    """Seconds; only of an outcome with arrivals."""
    return outcome.arrivals[0] - outcome.started


def gaps(outcome: RequestOutcome) -> list[float]:
    """Seconds between arrivals."""
    return [later - earlier for earlier, later in pairwise(outcome.arrivals)]


def succeeded(measured: Measured) -> list[RequestOutcome]:
    return [one for one in measured.outcomes if not one.error]


def tokens_until(outcome: RequestOutcome, end: float) -> float:
    """Its tokens that had come by then, taking all its pieces of text to be equally long."""
    pieces = sum(outcome.deltas)
    if outcome.ended <= end or not pieces:
        return float(outcome.tokens if outcome.ended <= end else 0)
    came = sum(n for at, n in zip(outcome.arrivals, outcome.deltas, strict=True) if at <= end)
    return outcome.tokens * came / pieces


def summarise(measured: Measured, plan: RunPlan) -> Summary:
    good = succeeded(measured)
    bad = [one for one in measured.outcomes if one.error]
    seconds = max(measured.end - measured.begin, 1e-9)
    tenants = [_tenant(number, measured, plan) for number in range(len(plan.tenants))]
    arrived = sum(len(one.arrivals) for one in good)
    several = len(tenants) > 1
    return Summary(
        seconds=seconds,
        requests=len(good),
        errors=dict(Counter(one.error for one in bad).most_common()),
        error_example=next((one.detail for one in bad if one.detail), ""),
        requests_per_s=sum(1 for one in good if one.ended <= measured.end) / seconds,
        tokens_per_s=sum(tokens_until(one, measured.end) for one in good) / seconds,
        completion_tokens=sum(one.tokens for one in good),
        prompt_tokens=sum(one.prompt_tokens for one in good),
        cached_tokens=sum(one.cached_tokens for one in good),
        tokens_from=_source(good),
        tokens_per_arrival=sum(one.tokens for one in good) / arrived if arrived else None,
        ttft_ms=quantiles(ttft(one) for one in good if one.arrivals),
        gap_ms=quantiles(gap for one in good for gap in gaps(one)),
        per_token_ms=quantiles(_per_token(one) for one in good if _measures_speed(one)),
        latency_ms=quantiles(one.ended - one.started for one in good),
        jain_per_client=jain([one.tokens_per_client for one in tenants]) if several else None,
        jain_per_tenant=jain([one.tokens for one in tenants]) if several else None,
        tenants=tenants if several else [],
        intruder=_intruder(measured),
        client_load=measured.client_load,
    )


def _source(good: list[RequestOutcome]) -> str:
    kinds = {"deltas" if one.usage_tokens is None else "usage" for one in good}
    return " and ".join(sorted(kinds)) or "nothing"


def _measures_speed(outcome: RequestOutcome) -> bool:
    return outcome.tokens > 1 and len(outcome.arrivals) > 1


def _per_token(outcome: RequestOutcome) -> float:
    return (outcome.arrivals[-1] - outcome.arrivals[0]) / (outcome.tokens - 1)


def _tenant(number: int, measured: Measured, plan: RunPlan) -> TenantSummary:
    tenant = plan.tenants[number]
    own = [one for one in measured.outcomes if one.tenant == number]
    good = [one for one in own if not one.error]
    tokens = sum(tokens_until(one, measured.end) for one in good)
    return TenantSummary(
        name=tenant.name,
        clients=tenant.clients,
        requests=len(good),
        errors=len(own) - len(good),
        tokens=tokens,
        tokens_per_client=tokens / tenant.clients,
        ttft_ms=quantiles(ttft(one) for one in good if one.arrivals),
    )


def _intruder(measured: Measured) -> IntruderSummary | None:
    one = measured.intruder
    if one is None:
        return None
    begin, end = one.started, one.arrivals[0] if one.arrivals else one.ended
    # Every gap of which a part lies between the long prompt's arrival and its first token.
    meanwhile = [
        later - earlier
        for other in succeeded(measured)
        for earlier, later in pairwise(other.arrivals)
        if later > begin and earlier < end
    ]
    return IntruderSummary(
        prompt_tokens=one.prompt_tokens,
        ttft_ms=1000 * ttft(one) if one.arrivals and not one.error else None,
        error=one.detail or one.error,
        gap_ms=quantiles(meanwhile),
    )
