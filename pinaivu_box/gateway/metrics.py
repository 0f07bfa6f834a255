"""Prometheus metrics of requests and engines."""

from __future__ import annotations

from collections import Counter as Sums
from collections.abc import Callable, Iterator
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from pinaivu_box.devices import DeviceMonitor
from pinaivu_box.engine.messages import EngineLoad
from pinaivu_box.gateway.device_views import DeviceView, device_views
from pinaivu_box.gateway.placement import Placement
from pinaivu_box.gateway.records import RequestRecord

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
disable_created_metrics()  # type: ignore[no-untyped-call]  # a series more for each, which nobody asks for
# Those of OpenTelemetry's conventions for generative AI, and three below them for small models on
# fast devices.
_GAP_SECONDS = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5,
)  # fmt: skip
_TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536, 262144, 1048576)
_ENGINE_GAUGES = {
    "running": "Sequences that are running.",
    "waiting": "Sequences that wait.",
    "kv_used": "Tokens of running sequences in the KV cache.",
    "kv_cached": "Tokens that finished sequences left in the KV cache.",
}
_ENGINE_COUNTS = {
    "steps": "Steps of the model's engines.",
    "tokens_computed": "Tokens that engines have computed.",
    "tokens_cached": "Prompt tokens that engines have found in their cache.",
    "tokens_restored": "Prompt tokens that engines have read from saved prefixes.",
    "preemptions": "Sequences that were preempted.",
    "tokens_drafted": "Tokens that were drafted.",
    "tokens_accepted": "Drafted tokens that were accepted.",
}


class Metrics:
    """One registry per box, so that several boxes in one process do not collide."""

    def __init__(self, placement: Placement, devices: DeviceMonitor) -> None:
        self.registry = CollectorRegistry()
        counter = partial(Counter, registry=self.registry)
        histogram = partial(Histogram, labelnames=["model"], registry=self.registry)
        self._requests = counter(
            "pinaivu_requests", "Inference requests by model and HTTP status.", ["model", "status"]
        )
        self._refusals = counter(
            "pinaivu_errors", "Requests that were answered with an error, by its code.", ["code"]
        )
        self._tokens = counter("pinaivu_tokens", "Tokens by model and kind.", ["model", "kind"])
        self._cached = counter(
            "pinaivu_cached_prompt_tokens",
            "Prompt tokens that were found in a cache, by model.",
            ["model"],
        )
        self._ttft = histogram(
            "pinaivu_time_to_first_token_seconds",
            "From the request's arrival to its first token.",
            buckets=_SECONDS,
        )
        self._gap = histogram(
            "pinaivu_time_per_output_token_seconds",
            "Of each answer, the mean time between two tokens after the first.",
            buckets=_GAP_SECONDS,
        )
        self._queue = histogram(
            "pinaivu_queue_seconds",
            "How long a request waited for its place in an engine, or at a peer or upstream.",
            buckets=_SECONDS,
        )
        self._duration = histogram(
            "pinaivu_request_seconds",
            "From the request's arrival to its receipt.",
            buckets=_SECONDS,
        )
        self._prompt = histogram(
            "pinaivu_request_prompt_tokens", "Prompt tokens of a request.", buckets=_TOKENS
        )
        self._completion = histogram(
            "pinaivu_request_completion_tokens", "Tokens of the answers to a request.",
            buckets=_TOKENS,
        )  # fmt: skip
        self.registry.register(_Engines(placement))
        self.registry.register(_Devices(placement, devices))

    def observe(self, record: RequestRecord, status: int) -> None:
        """A request has ended.  The time for a token is that of its first leg with tokens, since a
        second leg began anew."""
        model = record.job.model.id
        self._requests.labels(model, status).inc()
        self._tokens.labels(model, "prompt").inc(record.prompt_tokens)
        self._tokens.labels(model, "completion").inc(record.completion_tokens)
        self._cached.labels(model).inc(record.cached_tokens)
        trace = record.job.request_trace
        exemplar = {"trace_id": trace.trace_id} if trace is not None else None
        self._duration.labels(model).observe(record.elapsed_ms() / 1000, exemplar)
        if record.queue_ms is not None:
            self._queue.labels(model).observe(record.queue_ms / 1000)
        if record.ttft_ms is not None:
            self._ttft.labels(model).observe(record.ttft_ms / 1000, exemplar)
            self._prompt.labels(model).observe(record.prompt_tokens)
            self._completion.labels(model).observe(record.completion_tokens)
        speeds = (leg.tokens_per_s for leg in record.served)
        if speed := next((each for each in speeds if each), None):
            self._gap.labels(model).observe(1 / speed)

    def refuse(self, code: str) -> None:
        self._refusals.labels(code).inc()


class _Engines:
    """Read when scraped: what each engine said of itself after its last step.

    What an engine has counted stays counted when it ends, as far as it was scraped before.
    """

    def __init__(self, placement: Placement) -> None:
        self._placement = placement
        self._seen: dict[int, tuple[str, EngineLoad]] = {}  # by the identity of engines
        self._ended: Sums[tuple[str, str]] = Sums()  # by name and model

    def collect(self) -> Iterator[Metric]:
        before, engines = self._seen, self._placement.engines
        self._seen = {id(engine): (engine.model_id, engine.load) for engine in engines}
        for number, (model, load) in before.items():
            now = self._seen.get(number)
            if now is None or now[0] != model or now[1].steps < load.steps:  # it has ended
                for name in _ENGINE_COUNTS:
                    self._ended[name, model] += getattr(load, name)
        for name, text in _ENGINE_GAUGES.items():
            gauge = GaugeMetricFamily(f"pinaivu_engine_{name}", text, labels=["model"])
            for model, number in self._sums(name).items():
                gauge.add_metric([model], number)
            yield gauge
        for name, text in _ENGINE_COUNTS.items():
            counter = CounterMetricFamily(f"pinaivu_engine_{name}", text, labels=["model"])
            sums = self._sums(name)
            for (of, model), number in self._ended.items():
                sums[model] += number if of == name else 0
            for model, number in sums.items():
                counter.add_metric([model], number)
            yield counter

    def _sums(self, name: str) -> Sums[str]:
        """Over the replicas of each model."""
        sums: Sums[str] = Sums()
        for model, load in self._seen.values():
            sums[model] += getattr(load, name)
        return sums


class _Devices:
    """Read when scraped; `server.health` has had the state read before.  What a device does not
    tell is left out."""

    def __init__(self, placement: Placement, devices: DeviceMonitor) -> None:
        self._placement, self._devices = placement, devices

    def collect(self) -> Iterator[Metric]:
        views = device_views(self._devices.devices, self._placement.engines)
        memory = GaugeMetricFamily(
            "pinaivu_device_memory_bytes",
            "Memory of a device: in all, free, used by engines of this box, by other programs.",
            labels=["device", "kind"],
        )
        for view in views:
            for kind, size in _memory(view):
                memory.add_metric([view.name, kind], size)
        yield memory
        families: dict[str, tuple[str, Callable[[DeviceView], float | None]]] = {
            "utilisation_ratio": ("How much of the time it computes, from 0 to 1.", _busy),
            "temperature_celsius": ("Its temperature.", lambda view: view.temperature),
            "power_watts": ("The power that it draws.", lambda view: view.power),
        }
        for name, (text, value_of) in families.items():
            family = GaugeMetricFamily(f"pinaivu_device_{name}", text, labels=["device"])
            for view in views:
                if (value := value_of(view)) is not None:
                    family.add_metric([view.name], value)
            yield family


def _busy(view: DeviceView) -> float | None:
    return None if view.utilisation is None else view.utilisation / 100


def _memory(view: DeviceView) -> Iterator[tuple[str, int]]:
    yield "total", view.total
    if view.measured:
        yield "free", view.free
    yield "used", view.used
    if view.others is not None:
        yield "others", view.others
