"""Prometheus metrics of requests and engines."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric

from pinaivu_box.gateway.placement import Placement
from pinaivu_box.gateway.records import RequestRecord

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """One registry per box, so that several boxes in one process do not collide."""

    def __init__(self, placement: Placement) -> None:
        self.registry = CollectorRegistry()
        counter = partial(Counter, registry=self.registry)
        seconds = partial(Histogram, labelnames=["model"], buckets=_SECONDS, registry=self.registry)
        self._requests = counter(
            "pinaivu_requests", "Inference requests by model and HTTP status.", ["model", "status"]
        )
        self._refusals = counter(
            "pinaivu_errors", "Requests that were answered with an error, by its code.", ["code"]
        )
        self._tokens = counter("pinaivu_tokens", "Tokens by model and kind.", ["model", "kind"])
        self._ttft = seconds(
            "pinaivu_time_to_first_token_seconds", "From the request's arrival to its first token."
        )
        self._duration = seconds(
            "pinaivu_request_seconds", "From the request's arrival to its receipt."
        )
        self.registry.register(_Engines(placement))

    def observe(self, record: RequestRecord, status: int) -> None:
        model = record.job.model.id
        self._requests.labels(model, status).inc()
        self._tokens.labels(model, "prompt").inc(record.prompt_tokens)
        self._tokens.labels(model, "completion").inc(record.completion_tokens)
        self._duration.labels(model).observe(record.elapsed_ms() / 1000)
        if record.ttft_ms is not None:
            self._ttft.labels(model).observe(record.ttft_ms / 1000)

    def refuse(self, code: str) -> None:
        self._refusals.labels(code).inc()


class _Engines:
    """Read when scraped: what each engine said of itself after its last step."""

    def __init__(self, placement: Placement) -> None:
        self._placement = placement

    def collect(self) -> Iterator[Metric]:
        families = {
            "running": "Sequences that are running.",
            "waiting": "Sequences that wait.",
            "kv_used": "Tokens of running sequences in the KV cache.",
            "kv_cached": "Tokens that finished sequences left in the KV cache.",
            "steps": "Steps since the engine started.",
            "tokens_computed": "Tokens computed since the engine started.",
            "tokens_cached": "Prompt tokens found in the cache since the engine started.",
            "preemptions": "Sequences preempted since the engine started.",
        }
        for name, text in families.items():
            family = GaugeMetricFamily(f"pinaivu_engine_{name}", text, labels=["model"])
            for engine in self._placement.engines:
                family.add_metric([engine.model_id], getattr(engine.load, name))
            yield family
