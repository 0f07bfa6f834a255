"""Runs against one server, or alternately against two, and their ratios."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from statistics import median

import msgspec

from pinaivu_box.bench.run import RunPlan, measure
from pinaivu_box.bench.statistics import Quantiles, Summary, gaps, succeeded, summarise, ttft
from pinaivu_box.bench.target import BenchTarget, measure_scale, named

_FIGURES = ("tokens_per_s", "requests_per_s", "ttft_ms", "gap_ms", "per_token_ms", "latency_ms")
_FURTHER_FIGURES = ("jain_per_client", "jain_per_tenant", "tokens_per_arrival", "client_load")


class BenchRun(msgspec.Struct):
    """A run against the target with number `target`; `ttfts` and `gaps` are in seconds."""

    target: int
    pair: int
    summary: Summary
    ttfts: list[float]
    gaps: list[float]


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


async def prepare(
    targets: Sequence[BenchTarget], plan: RunPlan
) -> tuple[list[BenchTarget], RunPlan]:
    """The targets with their models, and the plan with the scale of the first one's tokenizer.

    Every server is asked, so that it has loaded its model.  Raises CliError.
    """
    complete = [await named(target) for target in targets]
    scale, *_ = [await measure_scale(target, plan.workload) for target in complete]
    workload = msgspec.structs.replace(plan.workload, scale=scale)
    return complete, msgspec.structs.replace(plan, workload=workload)


async def run_turn(
    targets: Sequence[BenchTarget],
    plan: RunPlan,
    pair: int,
    target: int,
    ended: Callable[[], None] = lambda: None,
) -> BenchRun:
    """Run the plan against a target; the runs of a pair send the same requests, other pairs others.

    `ended` is called at the end of each measured request.
    """
    plan = plan.seeded(f"{plan.workload.seed}/{pair}")
    measured = await measure(targets[target], plan, ended)
    completed = succeeded(measured)
    return BenchRun(
        target=target,
        pair=pair,
        summary=summarise(measured, plan),
        ttfts=[ttft(outcome) for outcome in completed if outcome.arrivals],
        gaps=[gap for outcome in completed for gap in gaps(outcome)],
    )


def figures(summary: Summary) -> dict[str, float]:
    """All figures of a run by dotted names: `ttft_ms.p50`, `tenants.light.tokens_per_client`, …"""
    values = {name: getattr(summary, name) for name in _FIGURES}
    if summary.intruder:
        values["intruder.ttft_ms"] = summary.intruder.ttft_ms
        values["intruder.gap_ms"] = summary.intruder.gap_ms
    for tenant in summary.tenants:
        values[f"tenants.{tenant.name}.tokens_per_client"] = tenant.tokens_per_client
        values[f"tenants.{tenant.name}.ttft_ms"] = tenant.ttft_ms
    values |= {name: getattr(summary, name) for name in _FURTHER_FIGURES}
    return dict(_flat(values))


def _flat(values: dict[str, float | Quantiles | None]) -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if isinstance(value, Quantiles):
            for part in ("p50", "p95", "p99", "max"):
                yield f"{name}.{part}", getattr(value, part)
        elif value is not None:
            yield name, value


def medians(runs: list[BenchRun], target: int) -> dict[str, float]:
    """The median of every figure over the runs of a server."""
    of_runs = [figures(run.summary) for run in runs if run.target == target]
    names = dict.fromkeys(name for of_run in of_runs for name in of_run)
    return {name: median(each[name] for each in of_runs if name in each) for name in names}


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
