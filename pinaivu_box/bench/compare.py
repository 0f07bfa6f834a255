"""Runs against one server, or alternately against two, and their ratios."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median

import msgspec

from pinaivu_box.bench.run import RunPlan, measure
from pinaivu_box.bench.statistics import (
    Quantiles,
    Summary,
    gaps,
    succeeded,
    summarise,
    ttft,
)
from pinaivu_box.bench.target import Target


class BenchRun(msgspec.Struct):
    """A run against the target with number `target`; `ttfts` and `gaps` are in seconds."""

    target: int
    pair: int
    summary: Summary
    ttfts: list[float]
    gaps: list[float]


class ComparisonProgress:
    """The progress of the runs; this implementation ignores it."""

    def begins(self, pair: int, target: int) -> None:
        """A run begins, with its warm-up."""

    def ended(self) -> None:
        """A request of the run has ended."""

    def done(self, run: BenchRun) -> None:
        """The run is complete."""


class Ratio(msgspec.Struct, frozen=True):
    """The ratios of a figure, first server / second server, of all pairs."""

    median: float
    min: float
    max: float
    pairs: list[float]


def turns(targets: int, pairs: int) -> Iterator[tuple[int, int]]:
    """(pair, target) in the order of the runs: A B, B A, A B, …"""
    for pair in range(pairs):
        order = range(targets) if pair % 2 == 0 else reversed(range(targets))
        yield from ((pair, target) for target in order)


async def run_all(
    targets: list[Target],
    plan: RunPlan,
    pairs: int,
    progress: ComparisonProgress | None = None,
) -> list[BenchRun]:
    """Run all pairs; the runs of a pair send the same requests, other pairs send others."""
    progress = progress or ComparisonProgress()
    runs = []
    for pair, target in turns(len(targets), pairs):
        plan_now = plan.seeded(f"{plan.workload.seed}/{pair}")
        progress.begins(pair, target)
        measured = await measure(targets[target], plan_now, progress.ended)
        completed = succeeded(measured)
        run = BenchRun(
            target=target,
            pair=pair,
            summary=summarise(measured, plan_now),
            ttfts=[ttft(outcome) for outcome in completed if outcome.arrivals],
            gaps=[gap for outcome in completed for gap in gaps(outcome)],
        )
        runs.append(run)
        progress.done(run)
    return runs


def figures(summary: Summary) -> dict[str, float]:
    """All figures of a run by dotted names: `ttft_ms.p50`, `tenants.light.tokens`, …"""
    values: dict[str, float] = {}
    for name in ("tokens_per_s", "requests_per_s"):
        values[name] = getattr(summary, name)
    for name in ("ttft_ms", "gap_ms", "per_token_ms", "latency_ms"):
        values |= _flat(name, getattr(summary, name))
    if summary.intruder:
        if summary.intruder.ttft_ms is not None:
            values["intruder.ttft_ms"] = summary.intruder.ttft_ms
        values |= _flat("intruder.gap_ms", summary.intruder.gap_ms)
    for tenant in summary.tenants:
        values[f"tenants.{tenant.name}.tokens_per_client"] = tenant.tokens_per_client
        values |= _flat(f"tenants.{tenant.name}.ttft_ms", tenant.ttft_ms)
    for name in ("jain_per_client", "jain_per_tenant", "tokens_per_arrival"):
        if (value := getattr(summary, name)) is not None:
            values[name] = value
    values["client_load"] = summary.client_load
    return values


def _flat(name: str, quantiles: Quantiles | None) -> dict[str, float]:
    if quantiles is None:
        return {}
    return {f"{name}.{part}": getattr(quantiles, part) for part in ("p50", "p95", "p99", "max")}


def medians(runs: list[BenchRun], target: int) -> dict[str, float]:
    """The median of every figure over the runs of a server."""
    values_by_name: dict[str, list[float]] = {}
    for run in runs:
        if run.target == target:
            for name, value in figures(run.summary).items():
                values_by_name.setdefault(name, []).append(value)
    return {name: median(values) for name, values in values_by_name.items()}


def ratios(runs: list[BenchRun]) -> dict[str, Ratio]:
    """First server / second server, for the figures that both have and that are not 0."""
    by_turn = {(run.pair, run.target): figures(run.summary) for run in runs}
    values_by_name: dict[str, list[float]] = {}
    for pair in sorted({run.pair for run in runs}):
        first, second = by_turn.get((pair, 0), {}), by_turn.get((pair, 1), {})
        for name, value in first.items():
            if second.get(name):
                values_by_name.setdefault(name, []).append(value / second[name])
    return {
        name: Ratio(median(values), min(values), max(values), values)
        for name, values in values_by_name.items()
    }
