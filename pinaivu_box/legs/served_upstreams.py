"""The upstreams that peers may use (`for_peers`), as `legs/server` serves them."""

from __future__ import annotations

from pinaivu_box.engine.messages import Tokenized
from pinaivu_box.errors import NoNodesAvailable
from pinaivu_box.gateway.backend import Job
from pinaivu_box.models.catalog import Model
from pinaivu_box.receipts.receipt import upstream_digest
from pinaivu_box.routing.circuit_breaker import CircuitBreaker
from pinaivu_box.upstream.upstream import Upstream
from pinaivu_box.upstream.upstreams import Upstreams


class ServedUpstreams:
    def __init__(self, upstreams: Upstreams, breaker: CircuitBreaker) -> None:
        self.breaker = breaker
        self._upstreams = upstreams

    def model(self, model_id: str, digest: str) -> Model | None:
        """The model of that name if `digest` stands for one of an upstream, and peers may use it;
        a file of that name here is another model."""
        offering = self._offering(model_id)
        if digest != upstream_digest(model_id) or not offering:
            return None
        return offering[0].model(model_id)

    def estimate(self, job: Job) -> tuple[Tokenized, int]:
        """See `Upstreams.tokenize`."""
        return self._upstreams.tokenize(job)

    def choose(self, model_id: str) -> Upstream:
        """The one with most room.  Raises NoNodesAvailable if none can be used now."""
        usable = [
            upstream
            for upstream in self._offering(model_id)
            if upstream.down is None
            and not upstream.busy_seconds
            and self.breaker.why(upstream.id) is None
        ]
        if not usable:
            raise NoNodesAvailable(f"No upstream of {model_id} can be used now.", retry_after=5)
        return max(usable, key=lambda upstream: upstream.places.free - upstream.places.waiting)

    def _offering(self, model_id: str) -> list[Upstream]:
        upstreams = self._upstreams.with_model(model_id)
        return [upstream for upstream in upstreams if upstream.config.for_peers]
