"""What `/metrics` says of the log."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from pinaivu_box.receipt_log.service import ReceiptLog


class LogMetrics(Collector):
    """Read when scraped."""

    def __init__(self, service: ReceiptLog) -> None:
        self._service = service

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily(
            "pinaivu_log_checkpoint_entries",
            "Entries of the log that the checkpoint covers which was made last since the start.",
            value=self._service.covered,
        )
        yield GaugeMetricFamily(
            "pinaivu_log_findings",
            "What was found changed behind the box's back, at the start or since.",
            value=len(self._service.findings) + len(self._service.histories.findings),
        )
        yield GaugeMetricFamily(
            "pinaivu_log_restarts",
            "Logs of this box that have ended.",
            value=max(0, len(self._service.histories.all) - 1),
        )
        adoption = self._service.histories.adoption
        yield GaugeMetricFamily(
            "pinaivu_log_adopting",
            "Whether receipts from before the log, or after the end of one, get entries (1 or 0).",
            value=int(adoption is not None and not adoption.done),
        )
