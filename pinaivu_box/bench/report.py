"""Runs as a JSON document and as table rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import msgspec

from pinaivu_box.bench.compare import BenchRun, medians, ratios
from pinaivu_box.bench.run import RunPlan
from pinaivu_box.bench.target import BenchTarget

# The figures that are shown, with their labels; the others are only in the JSON.
_LABELS = {
    "tokens_per_s": "tokens/s",
    "requests_per_s": "requests/s",
    **{f"ttft_ms.{part}": f"first token, {part}" for part in ("p50", "p95", "p99")},
    **{f"gap_ms.{part}": f"gap between tokens, {part}" for part in ("p50", "p95", "p99")},
    "per_token_ms.p50": "time per token, p50",
    "latency_ms.p50": "whole request, p50",
    "jain_per_client": "Jain's index, tokens per client",
    "jain_per_tenant": "Jain's index, tokens per tenant",
    "tokens_per_arrival": "tokens per arrival",
    "intruder.ttft_ms": "intruder: first token",
    **{
        f"intruder.gap_ms.{part}": f"gap of others meanwhile, {part}"
        for part in ("p50", "p99", "max")
    },
    "client_load": "load of this client",
}
_TENANT_LABELS = {"tokens_per_client": "tokens per client", "ttft_ms.p50": "first token, p50"}
_MAX_CLIENT_LOAD = 0.8  # of a core; above, the client may be the bottleneck


def document(
    targets: list[BenchTarget], plan: RunPlan, runs: list[BenchRun], started_at: str
) -> dict[str, Any]:
    """The document of `--json`, without keys.  Times are in milliseconds if the name says so."""
    settings = msgspec.to_builtins(plan)
    for tenant in settings["tenants"]:
        del tenant["key"]
    return {
        "version": 1,
        "started_at": started_at,
        "targets": [
            {"url": target.url, "model": target.model, "fields": target.fields}
            for target in targets
        ],
        "settings": settings,
        "runs": [
            {"target": run.target, "pair": run.pair, **msgspec.to_builtins(run.summary)}
            for run in runs
        ],
        "ratios": {name: msgspec.to_builtins(ratio) for name, ratio in ratios(runs).items()},
    }


def rows(targets: list[BenchTarget], runs: list[BenchRun]) -> list[list[str]]:
    """Rows: name, the median of each server and, for two servers, `ratio (min to max)`."""
    per_target = [medians(runs, number) for number in range(len(targets))]
    compared = ratios(runs)
    figures = []
    for name in dict.fromkeys(name for each in per_target for name in each):
        if (label := _label(name)) is None:
            continue
        row = [label, *(_value(name, each.get(name)) for each in per_target)]
        if len(targets) > 1:
            ratio = compared.get(name)
            row.append(
                f"{ratio.median:.2f} ({ratio.min:.2f} to {ratio.max:.2f})"
                if ratio and name != "client_load"
                else ""
            )
        figures.append(row)
    return [*_counts(len(targets), runs), *figures]


def notes(targets: list[BenchTarget], runs: list[BenchRun]) -> Iterator[str]:
    """Sentences about what may make the figures misleading."""
    for number, target in enumerate(targets):
        own = [run.summary for run in runs if run.target == number]
        if example := next((summary.error_example for summary in own if summary.error_example), ""):
            yield f"{target.url}: first error: {example.rstrip('.')}."
        for summary in own:
            if summary.intruder and summary.intruder.error:
                yield f"{target.url}: the intruder failed: {summary.intruder.error.rstrip('.')}."
        if any("deltas" in summary.tokens_from for summary in own):
            yield f"{target.url} reports no usage: its tokens are counted by pieces of text."
    if any(run.summary.client_load > _MAX_CLIENT_LOAD for run in runs):
        yield "This client used nearly a whole core: it may be the bottleneck, not the server."


def _counts(targets: int, runs: list[BenchRun]) -> Iterator[list[str]]:
    empty = [""] if targets > 1 else []
    own = [[run.summary for run in runs if run.target == number] for number in range(targets)]
    yield ["requests", *(f"{sum(summary.requests for summary in each):,}" for each in own), *empty]
    errors = [sum((Counter(summary.errors) for summary in each), Counter()) for each in own]
    for kind in dict.fromkeys(kind for counter in errors for kind in counter):
        yield [f"errors: {kind}", *(f"{counter[kind]:,}" for counter in errors), *empty]
    yield ["prompt tokens, mean", *(_mean(each, "prompt_tokens") for each in own), *empty]
    yield ["of these cached", *(_mean(each, "cached_tokens") for each in own), *empty]
    yield ["completion tokens, mean", *(_mean(each, "completion_tokens") for each in own), *empty]


def _mean(summaries: list[Any], name: str) -> str:
    """The mean per request; "-" for what the server does not report."""
    requests = sum(summary.requests for summary in summaries)
    reported = name == "completion_tokens" or any(summary.prompt_tokens for summary in summaries)
    if not requests or not reported:
        return "-"
    return f"{sum(getattr(summary, name) for summary in summaries) / requests:,.1f}"


def _label(name: str) -> str | None:
    """The label of a figure, None if it is not shown."""
    group, _, rest = name.partition(".")
    if group != "tenants":
        return _LABELS.get(name)
    tenant, _, figure = rest.partition(".")
    label = _TENANT_LABELS.get(figure)
    return label and f"{tenant}: {label}"


def _value(name: str, value: float | None) -> str:
    if value is None:
        return "-"
    if name == "client_load":
        return f"{100 * value:.0f} %"
    if "_ms" in name:
        return f"{value:,.1f} ms" if value < 100 else f"{value:,.0f} ms"
    return f"{value:,.3f}" if name.startswith("jain") else f"{value:,.2f}"
