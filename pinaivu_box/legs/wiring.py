"""What a box with peers has beside one without: whom to send requests to, and what to serve."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from random import Random

from pinaivu_box import amount
from pinaivu_box.amount import Prices
from pinaivu_box.config import Config
from pinaivu_box.gateway.local import LocalBackend
from pinaivu_box.gateway.placement import Placement
from pinaivu_box.identity import Identity
from pinaivu_box.legs import wire as leg_wire
from pinaivu_box.legs.admission import LegAdmission
from pinaivu_box.legs.client import PeerBackend
from pinaivu_box.legs.large_messages import LargeMessages
from pinaivu_box.legs.recorder import LedgerRecorder
from pinaivu_box.legs.runner import LegRunner, RoutingSettings
from pinaivu_box.legs.server import LegServer
from pinaivu_box.models.catalog import Catalog, Model
from pinaivu_box.network.network import Network
from pinaivu_box.routing.candidates import Candidates
from pinaivu_box.routing.circuit_breaker import CircuitBreaker
from pinaivu_box.routing.load import LoadTracker
from pinaivu_box.routing.reputation import Reputation
from pinaivu_box.routing.router import Weights
from pinaivu_box.routing.spending_limits import SpendingLimits


class Pool:
    """`books` gets every leg that was served for a peer or by one; `writable` raises
    NoNodesAvailable if nothing can be written now."""

    def __init__(
        self,
        identity: Identity,
        config: Config,
        catalog: Callable[[], Catalog],
        placement: Placement,
        local: LocalBackend,
        load: LoadTracker,
        network: Network,
        books: LedgerRecorder,
        writable: Callable[[], Awaitable[None]],
    ) -> None:
        # Whoever sets the clock changes no opinion.
        began = time.time() - time.monotonic()
        self.reputation = Reputation(lambda: began + time.monotonic())
        self._config = config
        self._large = LargeMessages()
        resting = CircuitBreaker(time.monotonic, Random())  # noqa: S311, it only spreads requests
        self.candidates = Candidates(
            identity.node_id, catalog, self._prices, self._currency, load, placement,
            network.peers, resting, self.reputation, SpendingLimits(books.debts, config.peering),
        )  # fmt: skip
        self.dispatch = LegRunner(
            self.candidates,
            local,
            PeerBackend(identity, network, books.keep, self._large),
            load,
            resting,
            self.reputation,
            placement.digest_of,
            self._currency,
            _routing(config),
        )
        self.serving = LegServer(
            identity, local, load, lambda name: catalog().find(name), self._prices,
            self._currency, LegAdmission(books, load), books.keep,
            placement.digest_of, writable, self._large,
        )  # fmt: skip
        network.handlers[leg_wire.PURPOSE] = self.serving.handle
        load.changed = network.changed

    def configure(self, config: Config) -> None:
        """After a reload."""
        self._config = config
        self.dispatch.routing = _routing(config)
        self.candidates.ceilings.configure(config.peering)

    def close(self) -> None:
        """End the process that looks at large messages."""
        self._large.close()

    def _prices(self, model: Model) -> Prices:
        pricing = self._config.pricing
        return amount.prices(pricing.models.get(model.id, pricing.per_1k_tokens))

    def _currency(self) -> str:
        return self._config.pricing.currency


def _routing(config: Config) -> RoutingSettings:
    peering = config.peering
    weights = Weights(peering.price_weight, peering.time_weight, peering.reputation_weight)
    return RoutingSettings(peering.policy, peering.same_name, weights, peering.hedge_ms / 1000)
