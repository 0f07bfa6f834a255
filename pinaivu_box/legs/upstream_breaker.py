"""Whether an upstream is left alone for some time, by how a leg there has ended."""

from __future__ import annotations

import logging

from pinaivu_box.errors import ApiError, UpstreamBusy, UpstreamFailed, UpstreamLost
from pinaivu_box.gateway.records import LegRecord
from pinaivu_box.routing.circuit_breaker import CircuitBreaker
from pinaivu_box.upstream.upstream import Upstream

log = logging.getLogger("pinaivu.legs")


class UpstreamOutcome:
    """Of one leg, which is sent there now."""

    def __init__(self, breaker: CircuitBreaker, upstream: Upstream) -> None:
        self._breaker, self._upstream = breaker, upstream
        self._sent = breaker.sent(upstream.id)

    def served(self, record: LegRecord) -> None:
        self._breaker.served(self._upstream.id)
        if record.finish_reason != "cancelled":
            self._upstream.served(record)

    def failed(self, error: ApiError) -> None:
        upstream = self._upstream
        faulty = isinstance(error, UpstreamLost)
        if isinstance(error, UpstreamFailed):
            faulty = upstream.fails_often()
            log.warning("%s failed on a request: %s", upstream.id, error.message)
        if faulty:
            seconds = self._breaker.failed(upstream.id, self._sent)
            log.warning("%s is left alone for %.1f s: %s", upstream.id, seconds, error.message)
            return
        self._breaker.served(upstream.id)  # it answers
        if isinstance(error, UpstreamBusy):
            upstream.leave_alone(error.retry_after or 1)
