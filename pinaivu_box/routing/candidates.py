"""The candidates for a leg: the engine here and what peers offer, as the router compares them."""

from __future__ import annotations

import hashlib
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pinaivu_box.amount import Prices
from pinaivu_box.bounded import BoundedDict
from pinaivu_box.errors import ModelNotFound, NoNodesAvailable
from pinaivu_box.gateway.backend import Job
from pinaivu_box.gateway.placement import Placement
from pinaivu_box.gossip.adverts import Offer
from pinaivu_box.models.catalog import Model, remote
from pinaivu_box.models.names import is_model_id
from pinaivu_box.network.peer import Peer
from pinaivu_box.routing.changes import Changes
from pinaivu_box.routing.circuit_breaker import CircuitBreaker
from pinaivu_box.routing.load import LoadTracker
from pinaivu_box.routing.reputation import Reputation
from pinaivu_box.routing.router import Candidate
from pinaivu_box.routing.spending_limits import SpendingLimits
from pinaivu_box.settings import LiveSettings

_WARM_SECONDS = 600.0  # that a conversation's cache is thought to be kept
_MAX_CONVERSATIONS = 4096
_TYPICAL_TOKENS = 256
_CHARACTERS_PER_TOKEN = 4
_BUSY = "said lately that it is busy"
_MAX_BUSY_SECONDS = 5.0  # that a refusal is believed
_ACCEPTED_SECONDS = 2.0  # in which a peer has settled a leg that it has served
_SETTLING_SECONDS = 0.1  # that a refusal is believed meanwhile


@dataclass(frozen=True)
class Destination:
    """A peer and its offer of a model; `prices` of 1,000 tokens (prompt, cached, completion)."""

    node_id: str
    name: str
    digest: str
    prices: tuple[str, str, str]
    currency: str
    pays_prompt: bool = True


class Candidates:
    """Knows what routing needs beside the offers: conversations, legs under way, busy peers.

    `changes` is notified when a box may serve that could not before.
    """

    def __init__(
        self,
        node_id: str,
        settings: LiveSettings,
        load: LoadTracker,
        placement: Placement,
        peers: Callable[[], Sequence[Peer]],
        breaker: CircuitBreaker,
        reputation: Reputation,
        spending: SpendingLimits,
    ) -> None:
        self.node_id = node_id
        self.spending = spending
        self.changes = Changes()
        self._settings = settings
        self._load, self._placement, self._peers = load, placement, peers
        self._breaker, self._reputation = breaker, reputation
        self._conversations: BoundedDict[bytes, tuple[str, float]] = BoundedDict(_MAX_CONVERSATIONS)
        # By node id; all times are monotonic.
        self._under_way: dict[str, dict[str, float]] = {}  # jobs that it serves, and since when
        self._busy: dict[str, float] = {}  # until when
        self.refusals: dict[str, tuple[str, float]] = {}  # the last of each peer, and when
        self._served: dict[str, float] = {}  # when each peer last served a leg
        self._last_offers: dict[str, Sequence[Offer]] = {}  # of each peer, those that count
        self._advertised: dict[str, Sequence[Offer]] = {}  # all in the advert that they are from

    # -- models ------------------------------------------------------------------------------------

    def find(self, model_id: str) -> Model:
        """The model here, or else as peers offer it, or did before they fell silent: that nobody
        can serve it now is not the client's mistake.  Raises ModelNotFound."""
        try:
            return self._settings.catalog.find(model_id)
        except ModelNotFound:
            models = [*self.remote_models(), *self._remote(self._expired_offers())]
            by_id = {model.id: model for model in reversed(models)}
            for name in (model_id, f"{model_id}:latest", model_id.removesuffix(":latest")):
                if name in by_id:
                    return by_id[name]
            raise

    def remote_models(self) -> list[Model]:
        """Those that only peers have; of several files under one name, the one most boxes have."""
        return self._remote(self._offers())

    def _remote(self, offers: list[tuple[Peer, Offer]]) -> list[Model]:
        here = {model.id for model in self._settings.catalog.models}
        files: dict[str, Counter[str]] = {}
        for _, offer in offers:
            if offer.id not in here:
                files.setdefault(offer.id, Counter())[offer.digest.hex()] += 1
        return [
            remote(name, max(sorted(digests), key=lambda digest: digests[digest]))
            for name, digests in sorted(files.items())
        ]

    def offered(self, model_id: str) -> bool:
        """Whether any peer has it."""
        return any(offer.id == model_id for _, offer in self._offers())

    def _offers(self) -> list[tuple[Peer, Offer]]:
        """Of all members whose adverts are valid."""
        peers = [peer for peer in self._peers() if peer.advert and peer.state != "revoked"]
        for peer in peers:
            if peer.advert and peer.advert.models is not self._advertised.get(peer.node_id):
                self._advertised[peer.node_id] = peer.advert.models
                # A name that no request can contain is no model, and in no list.
                offers = [offer for offer in peer.advert.models if is_model_id(offer.id)]
                self._last_offers[peer.node_id] = offers
        return [(peer, offer) for peer in peers for offer in self._last_offers[peer.node_id]]

    def _expired_offers(self) -> list[tuple[Peer, Offer]]:
        """The last offers of members whose adverts have expired."""
        return [
            (peer, offer)
            for peer in self._peers()
            if not peer.advert and peer.state != "revoked"
            for offer in self._last_offers.get(peer.node_id, ())
        ]

    # -- candidates --------------------------------------------------------------------------------

    def of(self, job: Job, digest: str) -> list[Candidate]:
        """Every box that has a model of that name; `digest` is that of the file here, "" if there
        is none."""
        warm = self._warm(job)
        candidates = [] if job.model.remote else [self._local(job, digest, warm)]
        for peer, offer in self._offers():
            if offer.id == job.model.id and peer.node_id != self.node_id:
                candidates.append(self._peer(job, peer, offer, warm))
        return candidates

    def destination(self, job: Job, node_id: str, digest: str) -> Destination:
        """That peer with its offer.  Raises ModelNotFound if it has withdrawn it meanwhile."""
        for peer, offer in self._offers():
            if (peer.node_id, offer.id, offer.digest.hex()) == (node_id, job.model.id, digest):
                currency = peer.advert.currency if peer.advert else ""
                return Destination(node_id, peer.name, digest, offer.prices, currency)
        raise ModelNotFound(f"{job.model.id} is not offered any more.", param="model")

    def offered_speed(self, job: Job, node_id: str) -> float:
        """Tokens per second of one stream, as the peer has advertised it."""
        for peer, offer in self._offers():
            if (peer.node_id, offer.id) == (node_id, job.model.id):
                return float(offer.tokens_per_s)
        return 0.0

    def _local(self, job: Job, digest: str, warm: str | None) -> Candidate:
        model, load = job.model, self._load
        refuses = None
        now = load.of(model.id)
        if now.queue and now.queue >= load.config.max_queue:
            refuses = "has a full queue"
        elif (why := self._placement.failing(model)) is not None:
            refuses = f"has an engine that failed: {why}"
        return Candidate(
            node_id=self.node_id,
            model=model.id,
            digest=digest,
            sequences=load.config.max_sequences,
            load=now,
            ttft_ms=load.ttft_ms(model),
            tokens_per_s=load.tokens_per_s(model.id),
            cost=_expected_cost(self._settings.config.pricing.prices_of(model.id), job),
            currency=self._settings.config.pricing.currency,
            local=True,
            known=True,
            warm=warm == self.node_id,
            refuses=refuses,
        )

    def _peer(self, job: Job, peer: Peer, offer: Offer, warm: str | None) -> Candidate:
        reported = peer.loads.get(offer.id)
        heard = reported.at if reported else peer.advert_at or 0.0
        under_way = self._under_way.get(peer.node_id, {})
        busy = self._busy.get(peer.node_id, 0.0) > time.monotonic()
        refuses = _BUSY if busy else None
        if job.peers is not None and not {peer.node_id, peer.name} & set(job.peers):
            refuses = "is not among the peers that the key allows"
        currency = peer.advert.currency if peer.advert else ""
        refuses = refuses or self.spending.refusal(
            peer.node_id, offer.price, currency, _max_cost(offer.price, job)
        )
        return Candidate(
            node_id=peer.node_id,
            model=offer.id,
            digest=offer.digest.hex(),
            sequences=offer.sequences,
            load=reported.load if reported else offer.load,
            ttft_ms=offer.ttft_ms,
            tokens_per_s=offer.tokens_per_s,
            cost=_expected_cost(offer.price, job),
            currency=currency,
            reputation=self._reputation.score(peer.node_id),
            rtt_ms=peer.route.rtt_ms if peer.route else None,
            sent=sum(began > heard for began in under_way.values()),
            warm=warm == peer.node_id,
            draining=peer.advert is not None and peer.advert.draining,
            known=reported is not None,
            gone=peer.gone or (peer.state != "connected" and reported is None),
            resting=self._breaker.why(peer.node_id),
            refuses=refuses,
        )

    # -- what happens to legs ----------------------------------------------------------------------

    def leg_sent(self, job: Job, node_id: str) -> None:
        """A leg of the job goes there, and the conversation's next request finds a warm cache."""
        self._under_way.setdefault(node_id, {})[job.id] = time.monotonic()
        self.spending.reserve(node_id, job.id, self._max_cost_at(node_id, job))
        self._conversations[_conversation(job)] = (node_id, time.monotonic())

    def leg_ended(self, job: Job, node_id: str) -> None:
        """However it has ended."""
        self._under_way.get(node_id, {}).pop(job.id, None)
        self.spending.release(node_id, job.id)
        self.changes.notify()

    def _max_cost_at(self, node_id: str, job: Job) -> int:
        offers = [offer for peer, offer in self._offers() if peer.node_id == node_id]
        costs = [_max_cost(offer.price, job) for offer in offers if offer.id == job.model.id]
        return max(costs, default=0)

    def leg_refused(self, node_id: str, refusal: NoNodesAvailable) -> None:
        """A peer has refused a leg: it is not asked for so long.  If it has just served one of ours
        it may still be settling that, and will have room at once."""
        now = time.monotonic()
        self.refusals[node_id] = (refusal.message, now)
        limit = _SETTLING_SECONDS if self._served_lately(node_id) else _MAX_BUSY_SECONDS
        self._busy[node_id] = now + min(refusal.retry_after or 1, limit)

    def leg_served(self, node_id: str) -> None:
        """A peer has served a leg to its end, so it has room."""
        self._busy.pop(node_id, None)
        self._served[node_id] = time.monotonic()
        self.changes.notify()

    def has_served_since(self, node_id: str, moment: float) -> bool:
        """Whether the peer has served a leg to its end after that moment (monotonic)."""
        return self._served.get(node_id, -math.inf) > moment

    def is_no_longer_busy(self, node_id: str, moment: float) -> bool:
        """Whether the peer has refused a leg after that moment, and the time is over for which it
        is not asked."""
        _, refused = self.refusals.get(node_id, ("", -math.inf))
        return refused >= moment and self._busy.get(node_id, 0.0) <= time.monotonic()

    def _served_lately(self, node_id: str) -> bool:
        return self.has_served_since(node_id, time.monotonic() - _ACCEPTED_SECONDS)

    def at_capacity_with_our_requests(self, job: Job) -> bool:
        """Whether a peer that may serve the job has no room for it while it serves other jobs of
        this box: it will have room when one of them ends."""
        return any(
            self._under_way.get(candidate.node_id) or self._served_lately(candidate.node_id)
            for candidate in self.of(job, "")
            if candidate.refuses == _BUSY
        )

    def next_expiry(self) -> float:
        """The monotonic time at which the next peer that is busy or has failed may be asked again;
        infinite if there is none."""
        now = time.monotonic()
        ends = [*self._busy.values(), *self._breaker.ends()]
        return min((end for end in ends if end > now), default=math.inf)

    def _warm(self, job: Job) -> str | None:
        node_id, since = self._conversations.get(_conversation(job), (None, 0.0))
        return node_id if time.monotonic() - since < _WARM_SECONDS else None


def tokens_of(job: Job) -> tuple[int, int]:
    """Of the prompt, as far as it is known, with what earlier legs have made; and at most of what
    is still to be made."""
    if job.read is not None:
        prompt = len(job.read)
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


def _expected_cost(prices: Prices, job: Job) -> int:
    return prices.most(*tokens_of(job))


def _max_cost(prices: Prices, job: Job) -> int:
    """As `_expected_cost`, but with an upper bound for a prompt that was not counted yet: as many
    tokens as what the client sent has bytes."""
    prompt, answer = tokens_of(job)
    if job.read is None and not isinstance(job.prompt, list):
        texts = (job.prompt or "", job.inputs or "", job.messages, job.tools or "")
        prompt = len(job.output) + sum(len(str(text).encode()) for text in texts)
    return prices.most(prompt, answer)


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
