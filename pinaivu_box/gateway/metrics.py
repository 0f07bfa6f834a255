"""Prometheus metrics of requests and engines."""

from __future__ import annotations

from collections import Counter as Sums
from collections.abc import Callable, Iterator
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric

from pinaivu_box.devices import DeviceMonitor
from pinaivu_box.gateway.device_views import DeviceView, device_views
from pinaivu_box.gateway.placement import Placement
from pinaivu_box.gateway.records import RequestRecord

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """One registry per box, so that several boxes in one process do not collide."""

    def __init__(self, placement: Placement, devices: DeviceMonitor) -> None:
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
        self.registry.register(_Devices(placement, devices))

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
            "tokens_restored": "Prompt tokens read from saved prefixes since the engine started.",
            "preemptions": "Sequences preempted since the engine started.",
            "tokens_drafted": "Tokens drafted since the engine started.",
            "tokens_accepted": "Drafted tokens that were accepted since the engine started.",
        }
        for name, text in families.items():
            family = GaugeMetricFamily(f"pinaivu_engine_{name}", text, labels=["model"])
            sums: Sums[str] = Sums()  # over the replicas of a model
            for engine in self._placement.engines:
                sums[engine.model_id] += getattr(engine.load, name)
            for model, number in sums.items():
                family.add_metric([model], number)
            yield family


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
            "utilisation_percent": ("How much of the time it computes.", lambda v: v.utilisation),
            "temperature_celsius": ("Its temperature.", lambda view: view.temperature),
            "power_watts": ("The power that it draws.", lambda view: view.power),
        }
        for name, (text, value_of) in families.items():
            family = GaugeMetricFamily(f"pinaivu_device_{name}", text, labels=["device"])
            for view in views:
                if (value := value_of(view)) is not None:
                    family.add_metric([view.name], value)
            yield family


def _memory(view: DeviceView) -> Iterator[tuple[str, int]]:
    yield "total", view.total
    if view.measured:
        yield "free", view.free
    yield "used", view.used
    if view.others is not None:
        yield "others", view.others
