"""The services that only a box with peers has: they send legs to peers, and serve theirs."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from random import Random

from pinaivu_box.gateway.local import LocalBackend
from pinaivu_box.gateway.placement import Placement
from pinaivu_box.gateway.request_spans import RequestSpans
from pinaivu_box.identity import Identity
from pinaivu_box.legs import wire as leg_wire
from pinaivu_box.legs.admission import LegAdmission
from pinaivu_box.legs.boxes import Boxes
from pinaivu_box.legs.client import PeerClient
from pinaivu_box.legs.large_messages import LargeMessages
from pinaivu_box.legs.recorder import LedgerRecorder
from pinaivu_box.legs.runner import LegRunner
from pinaivu_box.legs.served_upstreams import ServedUpstreams
from pinaivu_box.legs.server import LegServer
from pinaivu_box.network.network import Network
from pinaivu_box.policy import PeerPolicy
from pinaivu_box.routing.candidates import Candidates, Debts
from pinaivu_box.routing.circuit_breaker import CircuitBreaker
from pinaivu_box.routing.load import LoadTracker
from pinaivu_box.routing.reputation import Reputation
from pinaivu_box.settings import LiveSettings
from pinaivu_box.tracing.context import TraceContext
from pinaivu_box.upstream.upstreams import Upstreams


def without_peers(
    node_id: str,
    settings: LiveSettings,
    placement: Placement,
    local: LocalBackend,
    load: LoadTracker,
    upstreams: Upstreams,
) -> Boxes:
    """This box with its upstreams only."""
    breaker = CircuitBreaker(time.monotonic, Random())  # noqa: S311, it only spreads requests
    reputation = Reputation(time.monotonic)
    candidates = Candidates(
        node_id, settings, load, placement, lambda: (), _nothing_to_ask, breaker, reputation,
        _no_debts, upstreams,
    )  # fmt: skip
    upstreams.changed = candidates.changes.notify
    return Boxes(candidates, local, None, load, breaker, reputation)


async def _nothing_to_ask(model_id: str) -> None:
    """There are no peers whose load could be asked for."""


async def _no_debts() -> Debts:
    return {}


class PeerServices:
    """`policy` says what a peer may have, `recorder` gets every leg that was served for a peer or
    by one, and `writable` raises NoNodesAvailable if nothing can be written now.  `begin_span` is
    `Tracer.begin`."""

    def __init__(
        self,
        identity: Identity,
        settings: LiveSettings,
        placement: Placement,
        local: LocalBackend,
        load: LoadTracker,
        network: Network,
        policy: Callable[[str], Awaitable[PeerPolicy]],
        recorder: LedgerRecorder,
        writable: Callable[[], Awaitable[None]],
        upstreams: Upstreams,
        begin_span: Callable[[str], TraceContext | None],
        spans: RequestSpans,
    ) -> None:
        # Whoever sets the clock changes no opinion.
        began = time.time() - time.monotonic()
        self.reputation = Reputation(lambda: began + time.monotonic())
        self._large = LargeMessages()
        breaker = CircuitBreaker(time.monotonic, Random())  # noqa: S311, it only spreads requests
        self.candidates = Candidates(
            identity.node_id, settings, load, placement, network.peers, network.query_load,
            breaker, self.reputation, recorder.debts, upstreams,
        )  # fmt: skip
        peers = PeerClient(identity, network, recorder, self._large, settings)
        self.boxes = Boxes(self.candidates, local, peers, load, breaker, self.reputation)
        self.runner = LegRunner(identity.node_id, local, self.boxes)
        self.serving = LegServer(
            identity, local, load, settings, LegAdmission(policy, recorder, load),
            placement.digest_of, writable, self._large, ServedUpstreams(upstreams, breaker),
            begin_span, spans,
        )  # fmt: skip
        network.handlers[leg_wire.PURPOSE] = self.serving.handle
        network.peers_changed = self.candidates.changes.notify
        load.changed = network.changed

        def upstreams_changed() -> None:
            self.candidates.changes.notify()
            network.changed()

        upstreams.changed = upstreams_changed

    def close(self) -> None:
        """End the process that looks at large messages."""
        self._large.close()
