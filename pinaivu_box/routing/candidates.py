"""Selects who serves a leg: gathers the candidates (the engine here, what peers offer, upstreams),
asks how busy they are, and has the router compare them."""

from __future__ import annotations

import hashlib
import math
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from random import Random

from pinaivu_box.amount import Prices
from pinaivu_box.bounded import BoundedDict
from pinaivu_box.changes import Changes
from pinaivu_box.errors import ModelNotFound, NoNodesAvailable
from pinaivu_box.gateway.backend import Job
from pinaivu_box.gateway.placement import Placement
from pinaivu_box.gossip.adverts import ModelLoad, Offer
from pinaivu_box.models.catalog import Model, remote
from pinaivu_box.models.names import is_model_id, spellings
from pinaivu_box.models.prices import prices_of
from pinaivu_box.network.peer import Peer
from pinaivu_box.receipts.receipt import upstream_digest
from pinaivu_box.routing import spending_limits
from pinaivu_box.routing.circuit_breaker import CircuitBreaker
from pinaivu_box.routing.load import LoadTracker
from pinaivu_box.routing.reputation import Reputation
from pinaivu_box.routing.router import Candidate, Decision, Destination, RoutingRequest, route
from pinaivu_box.settings import LiveSettings
from pinaivu_box.upstream.upstream import Upstream
from pinaivu_box.upstream.upstreams import Upstreams

_WARM_SECONDS = 600.0  # that a conversation's cache is thought to be kept
_MAX_CONVERSATIONS = 4096
_MAX_PINNED = 4096  # requests whose file is remembered
_TYPICAL_TOKENS = 256
_CHARACTERS_PER_TOKEN = 4
_NO_IMAGES = "is sent no images: only the box that was asked looks at them"
_DISTRUSTED = "was found to say what is not so"
_BUSY = "said lately that it is busy"
_MAX_BUSY_SECONDS = 5.0  # that a refusal is believed
_ACCEPTED_SECONDS = 2.0  # in which a peer has accepted a leg that it has served
_ACCEPTING_SECONDS = 0.1  # that a refusal is believed meanwhile

_Tokens = tuple[int, int]  # of a prompt and its answer
Debts = Mapping[str, Mapping[str, int]]  # what this box owes, by peer and currency, in 10^-9


@dataclass
class _PeerState:
    """What this box knows of a peer beside its advert.  Times are monotonic."""

    advertised: Sequence[Offer] = ()  # in its last advert
    offers: Sequence[Offer] = ()  # those of them that count
    running: dict[str, tuple[float, int]] = field(default_factory=dict)  # jobs: since when, cost
    busy_until: float = 0.0
    refusal: tuple[str, float] | None = None  # the last one, and when, if no leg was served since
    served_at: float = -math.inf  # its last leg


class Candidates:
    """Knows what routing needs beside the offers: conversations, legs that run, busy peers.

    `changes` is notified when a box may serve that could not before.  `ask_loads` asks the peers
    how busy they are with a model, and `debts` reads the ledger.
    """

    def __init__(
        self,
        node_id: str,
        settings: LiveSettings,
        load: LoadTracker,
        placement: Placement,
        peers: Callable[[], Sequence[Peer]],
        ask_loads: Callable[[str], Awaitable[None]],
        breaker: CircuitBreaker,
        reputation: Reputation,
        debts: Callable[[], Awaitable[Debts]],
        upstreams: Upstreams,
    ) -> None:
        self.node_id = node_id
        self.changes = Changes()
        self.upstreams = upstreams
        self._settings = settings
        self._load, self._placement = load, placement
        self._peers, self._ask_loads = peers, ask_loads
        self._breaker, self._reputation, self._debts = breaker, reputation, debts
        self._owed: Debts = {}
        self._random = Random()  # noqa: S311, it only spreads requests
        self._pinned: BoundedDict[str, str] = BoundedDict(_MAX_PINNED)
        self._conversations: BoundedDict[bytes, tuple[str, float]] = BoundedDict(_MAX_CONVERSATIONS)
        self._states: defaultdict[str, _PeerState] = defaultdict(_PeerState)  # by node id

    # -- models ------------------------------------------------------------------------------------

    def find(self, model_id: str) -> Model:
        """The model here, or else as peers or upstreams offer it, or did before they fell silent:
        that nobody can serve it now is not the client's mistake.  Raises ModelNotFound."""
        try:
            return self._settings.catalog.find(model_id)
        except ModelNotFound:
            models = [*self.remote_models(), *self._remote(self._offers(expired=True))]
            by_id = {model.id: model for model in reversed(models)}
            for name in spellings(model_id):
                if name in by_id:
                    return by_id[name]
            raise

    def remote_models(self) -> list[Model]:
        """Those that only peers or upstreams have; of several files under one name, the one most
        boxes have."""
        here = {model.id for model in self._settings.catalog.models}
        of_upstreams = {
            model_id: model
            for model_id, model in self.upstreams.models().items()
            if model_id not in here
        }
        of_peers = {model.id: model for model in self._remote(self._offers())}
        both = of_upstreams | of_peers
        return [both[model_id] for model_id in sorted(both)]

    def _remote(self, offers: list[tuple[Peer, Offer]]) -> list[Model]:
        here = {model.id for model in self._settings.catalog.models}
        files: defaultdict[str, Counter[str]] = defaultdict(Counter)
        for _, offer in offers:
            if offer.id not in here:
                files[offer.id][offer.digest.hex()] += 1
        return [
            remote(name, max(sorted(digests), key=lambda digest: digests[digest]))
            for name, digests in sorted(files.items())
        ]

    def offered(self, model_id: str) -> bool:
        """Whether any peer or upstream has it."""
        if self.upstreams.with_model(model_id):
            return True
        return any(offer.id == model_id for _, offer in self._offers())

    def _offers(self, *, expired: bool = False) -> list[tuple[Peer, Offer]]:
        """Of all members whose adverts are valid, or the last ones of those whose have expired."""
        offers: list[tuple[Peer, Offer]] = []
        for peer in self._peers():
            state = self._states[peer.node_id]
            if peer.advert and peer.advert.models is not state.advertised:
                state.advertised = peer.advert.models
                # A name that no request can contain is no model, and in no list.
                state.offers = [offer for offer in state.advertised if is_model_id(offer.id)]
            if peer.state != "revoked" and (peer.advert is None) == expired:
                offers += [(peer, offer) for offer in state.offers]
        return offers

    # -- candidates --------------------------------------------------------------------------------

    def of(self, job: Job, digest: str) -> list[Candidate]:
        """Whoever has a model of that name; `digest` is that of the file here, "" if there is
        none."""
        warm, tokens, max_tokens = self._warm(job), tokens_of(job), _max_tokens_of(job)
        candidates = [] if job.model.remote else [self._local(job, digest, warm, tokens)]
        for peer, offer in self._offers():
            if offer.id == job.model.id:
                candidates.append(self._peer(job, peer, offer, warm, tokens, max_tokens))
        for upstream in self.upstreams.with_model(job.model.id):
            candidates.append(self._upstream(job, upstream, warm, tokens))
        return candidates

    def _local(self, job: Job, digest: str, warm: str | None, tokens: _Tokens) -> Candidate:
        model, load, config = job.model, self._load, self._settings.config
        refuses = None
        now = load.of(model.id)
        if now.queue and now.queue >= config.engine.max_queue:
            refuses = "has a full queue"
        elif (why := self._placement.failing(model)) is not None:
            refuses = f"has an engine that failed: {why}"
        return Candidate(
            node_id=self.node_id,
            model=model.id,
            digest=digest,
            sequences=load.places(model.id),
            load=now,
            ttft_ms=load.ttft_ms(model),
            tokens_per_s=load.tokens_per_s(model.id),
            cost=prices_of(model, config.pricing).most(*tokens),
            currency=config.pricing.currency,
            cpu_variant=config.engine.cpu_variant or load.cpu_variant(),
            local=True,
            known=True,
            warm=warm == self.node_id,
            refuses=refuses,
        )

    def _peer(
        self,
        job: Job,
        peer: Peer,
        offer: Offer,
        warm: str | None,
        tokens: _Tokens,
        max_tokens: _Tokens,
    ) -> Candidate:
        advert, price, state = peer.advert, offer.price, self._states[peer.node_id]
        assert advert is not None  # or it would offer nothing
        reported = peer.loads.get(offer.id)
        heard = reported.at if reported else peer.advert_at or 0.0
        max_cost = price.most(*max_tokens)
        of_upstream = offer.digest.hex() == upstream_digest(offer.id)
        return Candidate(
            node_id=peer.node_id,
            model=offer.id,
            digest=offer.digest.hex(),
            sequences=offer.sequences,
            load=reported.load if reported else offer.load,
            ttft_ms=offer.ttft_ms,
            tokens_per_s=offer.tokens_per_s,
            cost=price.most(*tokens),
            currency=advert.currency,
            reputation=self._reputation.score(peer.node_id),
            rtt_ms=peer.route.rtt_ms if peer.route else None,
            sent=sum(began > heard for began, _ in state.running.values()),
            warm=warm == peer.node_id,
            draining=advert.draining,
            cpu_variant=advert.cpu_variant,
            known=reported is not None,
            gone=peer.gone or (peer.state != "connected" and reported is None),
            tripped=self._breaker.why(peer.node_id),
            refuses=self._refusal(job, peer, advert.currency, price, max_cost, of_upstream),
            max_cost=max_cost,
            destination=Destination(
                peer.node_id,
                peer.name,
                offer.digest.hex(),
                offer.prices,
                advert.currency,
                of_upstream=of_upstream,
            ),
        )

    def _refusal(
        self, job: Job, peer: Peer, currency: str, price: Prices, cost: int, of_upstream: bool
    ) -> str | None:
        """Why this box does not ask the peer for the job, which may cost so much, or None."""
        state = self._states[peer.node_id]
        if job.images:
            return _NO_IMAGES
        if of_upstream and job.leg:
            return "has it from an upstream, which goes on with nobody's answer"
        if job.peers and not {peer.node_id, peer.name} & set(job.peers):
            return "is not among the peers that the key allows"
        if self._reputation.distrusts(peer.node_id):
            return _DISTRUSTED
        if state.busy_until > time.monotonic():
            return _BUSY
        if (why := self._reputation.forked(peer.node_id)) is not None:
            return why
        # What runs there counts too, so requests side by side do not exceed a limit together.
        owed = self._owed.get(peer.node_id, {}).get(currency, 0)
        owed += sum(running for _, running in state.running.values())
        peering = self._settings.config.peering
        return spending_limits.refusal(price, peering, currency, owed=owed, cost=cost)

    def _upstream(
        self, job: Job, upstream: Upstream, warm: str | None, tokens: _Tokens
    ) -> Candidate:
        config, places = self._settings.config, upstream.places
        tripped = self._breaker.why(upstream.id)
        refuses = None
        if job.leg:
            refuses = "is an upstream, which goes on with nobody's answer"
        elif job.peers and upstream.name not in job.peers:
            refuses = "is not among the peers that the key allows"
        elif upstream.down is not None:
            refuses = f"is an upstream that cannot be used: it {upstream.down}"
        elif upstream.busy_seconds:
            refuses = f"has asked to be left alone for {math.ceil(upstream.busy_seconds)} s"
        elif places.waiting and places.waiting >= config.engine.max_queue:
            refuses = "has a full queue"
        model = upstream.model(job.model.id)
        return Candidate(
            node_id=upstream.id,
            model=job.model.id,
            digest=model.recorded_digest or "",
            sequences=places.limit,
            load=ModelLoad(places.free, 2**30, places.waiting),
            ttft_ms=upstream.ttft_ms,
            tokens_per_s=upstream.tokens_per_s,
            cost=prices_of(model, config.pricing).most(*tokens),
            currency=config.pricing.currency,
            known=True,
            warm=warm == upstream.id,
            gone=tripped is not None,  # it is not asked at all then, unlike a peer
            tripped=tripped,
            refuses=refuses,
            upstream=upstream.name,
        )

    # -- the choice --------------------------------------------------------------------------------

    @property
    def hedge_seconds(self) -> float:
        """After this time without a first token a second box is asked as well; 0: never."""
        return self._settings.config.peering.hedge_ms / 1000

    async def select(self, job: Job, tried: Collection[str]) -> Decision:
        """Select the box of a leg, none of those that were `tried`."""
        here = "" if job.model.remote else await self._placement.digest_of(job.model)
        if self._settings.config.peering.max_debt:
            self._owed = await self._debts()
        request = self._request(job, here, tried)
        candidates = self.of(job, here)
        decision = route(candidates, request, self._random)
        if decision.unsure:
            await self._ask_loads(job.model.id)
            candidates = self.of(job, here)
            decision = route(candidates, request, self._random)
        if decision.chosen is None:  # rather who failed lately than nobody, if its link stands
            untripped = [
                candidate if candidate.gone else replace(candidate, tripped=None)
                for candidate in candidates
            ]
            decision = route(untripped, request, self._random)
        if decision.chosen is not None and not decision.chosen.upstream:
            # All choices and legs of a request that boxes serve are of one file.
            self._pinned.setdefault(job.request_id, decision.chosen.digest)
        return decision

    def _request(self, job: Job, here: str, tried: Collection[str]) -> RoutingRequest:
        config, pinned = self._settings.config, job.digest or self._pinned.get(job.request_id)
        peering = config.peering
        return RoutingRequest(
            model=job.model.id,
            digest=pinned or here or job.model.recorded_digest,
            tokens=sum(tokens_of(job)),
            currency=config.pricing.currency,
            policy=job.routing or peering.policy,
            same_name=peering.same_name and pinned is None,
            local_only=job.local_only,
            tried=tried,
            weights=(peering.price_weight, peering.time_weight, peering.reputation_weight),
            exactness=job.exactness,
        )

    # -- what happens to legs ----------------------------------------------------------------------

    def leg_sent(self, job: Job, to: Candidate) -> None:
        """A leg of the job goes there, and the conversation's next request finds a warm cache."""
        now = time.monotonic()
        self._states[to.node_id].running[job.id] = (now, to.max_cost)
        self._conversations[_conversation(job)] = (to.node_id, now)

    def leg_ended(self, job: Job, node_id: str) -> None:
        """However it has ended."""
        self._states[node_id].running.pop(job.id, None)
        self.changes.notify()

    def leg_refused(self, node_id: str, error: NoNodesAvailable) -> None:
        """A peer has refused a leg: it is not asked for as long as it says.  If it has just served
        one of ours it may not have counted its end yet, and will have room at once."""
        state, now = self._states[node_id], time.monotonic()
        state.refusal = (error.message, now)
        limit = _ACCEPTING_SECONDS if self._served_lately(node_id) else _MAX_BUSY_SECONDS
        state.busy_until = now + min(error.retry_after or 1, limit)

    def leg_served(self, node_id: str) -> None:
        """A peer has served a leg to its end, so it has room."""
        state = self._states[node_id]
        state.busy_until, state.refusal, state.served_at = 0.0, None, time.monotonic()
        self.changes.notify()

    def last_refusal(self, node_id: str) -> tuple[str, float] | None:
        """Why the peer has refused a leg, and when (monotonic), if it has served none since."""
        return self._states[node_id].refusal

    def has_served_since(self, node_id: str, moment: float) -> bool:
        """Whether the peer has served a leg to its end after that moment (monotonic)."""
        return self._states[node_id].served_at > moment

    def is_no_longer_busy(self, node_id: str, moment: float) -> bool:
        """Whether the peer has refused a leg after that moment, and the time is over for which it
        is not asked."""
        state = self._states[node_id]
        refused = state.refusal is not None and state.refusal[1] >= moment
        return refused and state.busy_until <= time.monotonic()

    def _served_lately(self, node_id: str) -> bool:
        return self.has_served_since(node_id, time.monotonic() - _ACCEPTED_SECONDS)

    def at_capacity_with_our_requests(self, job: Job) -> bool:
        """Whether a peer that may serve the job has no room for it while it serves other jobs of
        this box: it will have room when one of them ends."""
        return any(
            self._states[candidate.node_id].running or self._served_lately(candidate.node_id)
            for candidate in self.of(job, "")
            if candidate.refuses == _BUSY
        )

    def next_expiry(self) -> float:
        """The monotonic time at which the next peer that is busy or has failed may be asked again;
        infinite if there is none."""
        now = time.monotonic()
        ends = [*(state.busy_until for state in self._states.values()), *self._breaker.ends()]
        return min((end for end in ends if end > now), default=math.inf)

    def _warm(self, job: Job) -> str | None:
        node_id, since = self._conversations.get(_conversation(job), (None, 0.0))
        return node_id if time.monotonic() - since < _WARM_SECONDS else None


def tokens_of(job: Job) -> _Tokens:
    """Of the prompt, as far as it is known, with what earlier legs have made; and at most of what
    is still to be made."""
    if job.prompt_tokens is not None:
        prompt = len(job.prompt_tokens)
    elif isinstance(job.prompt, list):
        prompt = len(job.prompt)
    else:
        text = job.prompt if job.prompt is not None else (job.inputs or job.messages)
        prompt = len(str(text)) // _CHARACTERS_PER_TOKEN
    if job.inputs is not None:
        return prompt, 0
    output = len(job.output)
    answer = _TYPICAL_TOKENS if job.max_tokens is None else job.max_tokens - output
    return prompt + output, max(0, answer)


def _max_tokens_of(job: Job) -> _Tokens:
    """As `tokens_of`, but with an upper bound for a prompt that was not counted yet: as many tokens
    as what the client sent has bytes."""
    prompt, answer = tokens_of(job)
    if job.prompt_tokens is None and not isinstance(job.prompt, list):
        texts = (job.prompt or "", job.inputs or "", job.messages, job.tools or "")
        prompt = len(job.output) + sum(len(str(text).encode()) for text in texts)
    return prompt, answer


def _conversation(job: Job) -> bytes:
    """The same for all requests that begin alike: model, tenant, and the first two messages."""
    begin: object = (
        job.prompt[:512]
        if job.prompt is not None
        else [
            (message.get("role"), len(text := message.get("content") or ""), text[:4096])
            for message in job.messages[:2]
        ]
    )
    return hashlib.sha256(f"{job.model.id}\n{job.tenant}\n{begin}".encode()).digest()
