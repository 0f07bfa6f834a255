"""Selects the box of a leg: gathers the candidates, asks peers how busy they are, and routes."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection
from dataclasses import replace
from random import Random

from pinaivu_box.bounded import BoundedDict
from pinaivu_box.gateway.backend import Job
from pinaivu_box.models.catalog import Model
from pinaivu_box.routing.candidates import Candidates, tokens_of
from pinaivu_box.routing.router import Candidate, Decision, RoutingRequest, Weights, route, unsure
from pinaivu_box.settings import LiveSettings

_MAX_PINNED = 4096  # requests whose file is remembered


class Selector:
    """`digest` is of the file that a local model runs (see `Placement.digest_of`); `ask_loads` asks
    the peers how busy they are with a model."""

    def __init__(
        self,
        candidates: Candidates,
        digest: Callable[[Model], Awaitable[str]],
        ask_loads: Callable[[str], Awaitable[None]],
        settings: LiveSettings,
    ) -> None:
        self._candidates, self._settings = candidates, settings
        self._digest, self._ask_loads = digest, ask_loads
        self._random = Random()  # noqa: S311, it only spreads requests
        self._pinned: BoundedDict[str, str] = BoundedDict(_MAX_PINNED)

    @property
    def hedge_seconds(self) -> float:
        """After this time without a first token a second box is asked as well; 0: never."""
        return self._settings.config.peering.hedge_ms / 1000

    async def select(self, job: Job, tried: Collection[str]) -> tuple[Decision, str]:
        """The decision, and the digest of the file at the chosen node ("" if there is none).
        `tried` are nodes that are not to be asked again."""
        here = "" if job.model.remote else await self._digest(job.model)
        await self._candidates.spending.read_debts()
        request = self._request(job, here, tried)
        candidates = self._candidates.of(job, here)
        decision = self._route(candidates, request)
        if unsure(decision, candidates, request):
            await self._ask_loads(job.model.id)
            candidates = self._candidates.of(job, here)
            decision = self._route(candidates, request)
        if decision.node_id is None:  # rather who failed lately than nobody, if its link stands
            woken = [
                candidate if candidate.gone else replace(candidate, resting=None)
                for candidate in candidates
            ]
            decision = self._route(woken, request)
        return decision, self._pin(job, decision, candidates, request)

    def _request(self, job: Job, here: str, tried: Collection[str]) -> RoutingRequest:
        config, pinned = self._settings.config, job.digest or self._pinned.get(job.request_id)
        return RoutingRequest(
            model=job.model.id,
            digest=pinned or here or job.model.recorded_digest,
            tokens=sum(tokens_of(job)),
            currency=config.pricing.currency,
            policy=job.routing or config.peering.policy,
            same_name=config.peering.same_name and pinned is None,
            local_only=job.local_only,
            tried=tried,
        )

    def _route(self, candidates: list[Candidate], request: RoutingRequest) -> Decision:
        peering = self._settings.config.peering
        weights = Weights(peering.price_weight, peering.time_weight, peering.reputation_weight)
        return route(candidates, request, self._random, weights)

    def _pin(
        self,
        job: Job,
        decision: Decision,
        candidates: list[Candidate],
        request: RoutingRequest,
    ) -> str:
        """All choices and legs of a request are of one file.  A node may offer several under that
        name: it is the one that was asked for, or else the first."""
        digests = [
            candidate.digest for candidate in candidates if candidate.node_id == decision.node_id
        ]
        if not digests:
            return ""
        digest = request.digest if request.digest in digests else digests[0]
        if job.request_id not in self._pinned:
            self._pinned[job.request_id] = digest
        return digest
