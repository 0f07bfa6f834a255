"""Where spans of this box begin, and where they go."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter

from pinaivu_box import __version__
from pinaivu_box.settings import LiveSettings
from pinaivu_box.tracing import context
from pinaivu_box.tracing.context import TraceContext
from pinaivu_box.tracing.exporter import Exporter
from pinaivu_box.tracing_headers import headers_in


class Tracer:
    def __init__(self, settings: LiveSettings, node_id: str, registry: CollectorRegistry) -> None:
        self._settings = settings
        spans = Counter(
            "pinaivu_trace_spans",
            "Spans that the collector has taken, and those that were dropped.",
            ["result"],
            registry=registry,
        )
        for result in ("exported", "dropped"):
            spans.labels(result)
        resource = {
            "service.name": "pinaivu-box",
            "service.version": __version__,
            "service.instance.id": node_id,
        }
        self._exporter = Exporter(
            self._target, resource, lambda result, count: spans.labels(result).inc(count)
        )
        self.add = self._exporter.add
        self.close = self._exporter.close

    def begin(self, traceparent: str | None) -> TraceContext | None:
        """The span of a request with that header; None if it is not traced."""
        config = self._settings.config.tracing
        return context.begin(traceparent, config.sample) if config.endpoint else None

    def _target(self) -> tuple[str, dict[str, str]] | None:
        current = self._settings.current
        secret, endpoint = current.tracing_headers, current.config.tracing.endpoint
        if not endpoint:
            return None
        return endpoint, headers_in(secret.reveal()) if secret is not None else {}
