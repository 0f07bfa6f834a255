"""Prometheus metrics of upstreams, read when they are scraped."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client.core import GaugeMetricFamily, Metric

from pinaivu_box.upstream.upstream import Upstream
from pinaivu_box.upstream.upstreams import Upstreams

_GAUGES: dict[str, tuple[str, Callable[[Upstream], float]]] = {
    "up": ("Whether the upstream can be used.", lambda upstream: upstream.down is None),
    "running": ("Requests that run there.", lambda upstream: upstream.places.running),
    "waiting": ("Requests that wait for a place there.", lambda upstream: upstream.places.waiting),
}


class UpstreamMetrics:
    def __init__(self, upstreams: Upstreams) -> None:
        self._upstreams = upstreams

    def collect(self) -> Iterator[Metric]:
        for name, (text, value) in _GAUGES.items():
            family = GaugeMetricFamily(f"pinaivu_upstream_{name}", text, labels=["upstream"])
            for upstream in self._upstreams.all:
                family.add_metric([upstream.name], value(upstream))
            yield family
