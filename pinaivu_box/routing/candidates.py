"""Who may serve a job: the engine here and what peers offer, as the router wants to see them."""

from __future__ import annotations

import hashlib
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pinaivu_box.amount import Prices
from pinaivu_box.bounded import BoundedDict
from pinaivu_box.errors import ModelNotFound
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
_CONVERSATIONS = 4096
_TYPICAL_TOKENS = 256
_CHARACTERS_A_TOKEN = 4
_BUSY = "said lately that it is busy"
_LONGEST_BUSY = 5.0  # seconds that a refusal is believed
_FREED_SECONDS = 2.0  # in which a peer knows that what it has served was accepted
_MOMENT_SECONDS = 0.1


@dataclass(frozen=True)
class Destination:
    """A peer, and what it has offered: prices of 1,000 tokens (prompt, cached, completion)."""

    node_id: str
    name: str
    digest: str
    prices: tuple[str, str, str]
    currency: str
    pays_prompt: bool = True


class Candidates:
    """Keeps what routing needs beside the offers: conversations, legs under way, who is busy.

    `changes` tells that somebody may serve now who could not before.
    """

    def __init__(
        self,
        me: str,
        settings: LiveSettings,
        load: LoadTracker,
        placement: Placement,
        peers: Callable[[], Sequence[Peer]],
        resting: CircuitBreaker,
        reputation: Reputation,
        spending: SpendingLimits,
    ) -> None:
        self.me = me
        self.spending = spending
        self.changes = Changes()
        self._settings = settings
        self._load, self._placement, self._peers = load, placement, peers
        self._resting, self._reputation = resting, reputation
        self._conversations: BoundedDict[bytes, tuple[str, float]] = BoundedDict(_CONVERSATIONS)
        self._under_way: dict[str, dict[str, float]] = {}
        self._busy: dict[str, float] = {}
        self.refusals: dict[str, tuple[str, float]] = {}  # a peer's last, and when (monotonic)
        self._freed: dict[str, float] = {}
        self._last: dict[str, Sequence[Offer]] = {}  # that each peer has made
        self._said: dict[str, Sequence[Offer]] = {}  # as its advert has them

    # -- models ------------------------------------------------------------------------------------

    def find(self, model_id: str) -> Model:
        """The model here, or else as peers offer it, or did before they fell silent: that nobody
        can serve it now is not the client's mistake.  Raises ModelNotFound."""
        try:
            return self._settings.catalog.find(model_id)
        except ModelNotFound:
            offered = [*self.remote_models(), *self._remote(self._unheard())]
            found = {one.id: one for one in reversed(offered)}
            for name in (model_id, f"{model_id}:latest", model_id.removesuffix(":latest")):
                if name in found:
                    return found[name]
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
            remote(name, max(sorted(digests), key=lambda one: digests[one]))
            for name, digests in sorted(files.items())
        ]

    def offered(self, model_id: str) -> bool:
        """Whether any peer has it."""
        return any(offer.id == model_id for _, offer in self._offers())

    def _offers(self) -> list[tuple[Peer, Offer]]:
        heard = [one for one in self._peers() if one.advert and one.state != "revoked"]
        for one in heard:
            if one.advert and one.advert.models is not self._said.get(one.node_id):
                self._said[one.node_id] = one.advert.models
                # A name that nobody can ask for is no model: in no list, and in nobody's way.
                named = [offer for offer in one.advert.models if is_model_id(offer.id)]
                self._last[one.node_id] = named
        return [(one, offer) for one in heard for offer in self._last[one.node_id]]

    def _unheard(self) -> list[tuple[Peer, Offer]]:
        """The last offers of members whose adverts have expired."""
        silent = [one for one in self._peers() if not one.advert and one.state != "revoked"]
        return [(one, offer) for one in silent for offer in self._last.get(one.node_id, ())]

    # -- candidates --------------------------------------------------------------------------------

    def of(self, job: Job, digest: str) -> list[Candidate]:
        """Every box that has a model of that name; `digest` is that of the file here, "" if there
        is none."""
        warm = self._warm(job)
        candidates = [] if job.model.remote else [self._local(job, digest, warm)]
        for peer, offer in self._offers():
            if offer.id == job.model.id and peer.node_id != self.me:
                candidates.append(self._peer(job, peer, offer, warm))
        return candidates

    def destination(self, job: Job, node_id: str, digest: str) -> Destination:
        """That peer with its offer.  Raises ModelNotFound if it has withdrawn it meanwhile."""
        for peer, offer in self._offers():
            if (peer.node_id, offer.id, offer.digest.hex()) == (node_id, job.model.id, digest):
                currency = peer.advert.currency if peer.advert else ""
                return Destination(node_id, peer.name, digest, offer.prices, currency)
        raise ModelNotFound(f"{job.model.id} is not offered any more.", param="model")

    def promised(self, job: Job, node_id: str) -> float:
        """Tokens a second of one stream."""
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
            node_id=self.me,
            model=model.id,
            digest=digest,
            sequences=load.config.max_sequences,
            load=now,
            ttft_ms=load.ttft_ms(model),
            tokens_per_s=load.tokens_per_s(model.id),
            cost=_cost(self._settings.config.pricing.prices_of(model.id), job),
            currency=self._settings.config.pricing.currency,
            local=True,
            known=True,
            warm=warm == self.me,
            refuses=refuses,
        )

    def _peer(self, job: Job, peer: Peer, offer: Offer, warm: str | None) -> Candidate:
        now = peer.loads.get(offer.id)
        heard = now.at if now else peer.advert_at or 0.0
        under_way = self._under_way.get(peer.node_id, {})
        busy = self._busy.get(peer.node_id, 0.0) > time.monotonic()
        refuses = _BUSY if busy else None
        if job.peers is not None and not {peer.node_id, peer.name} & set(job.peers):
            refuses = "is not among the peers that the key allows"
        currency, most = peer.advert.currency if peer.advert else "", _most(offer.price, job)
        refuses = refuses or self.spending.refusal(peer.node_id, offer.price, currency, most)
        return Candidate(
            node_id=peer.node_id,
            model=offer.id,
            digest=offer.digest.hex(),
            sequences=offer.sequences,
            load=now.load if now else offer.load,
            ttft_ms=offer.ttft_ms,
            tokens_per_s=offer.tokens_per_s,
            cost=_cost(offer.price, job),
            currency=currency,
            reputation=self._reputation.score(peer.node_id),
            rtt_ms=peer.route.rtt_ms if peer.route else None,
            sent=sum(began > heard for began in under_way.values()),
            warm=warm == peer.node_id,
            draining=peer.advert is not None and peer.advert.draining,
            known=now is not None,
            gone=peer.gone or (peer.state != "connected" and now is None),
            resting=self._resting.why(peer.node_id),
            refuses=refuses,
        )

    # -- what happens to legs ----------------------------------------------------------------------

    def sent(self, job: Job, node_id: str) -> None:
        """It goes there: the conversation's next request finds a warm cache there."""
        self._under_way.setdefault(node_id, {})[job.id] = time.monotonic()
        self.spending.reserve(node_id, job.id, self._most_at(node_id, job))
        self._conversations[_conversation(job)] = (node_id, time.monotonic())

    def ended(self, job: Job, node_id: str) -> None:
        self._under_way.get(node_id, {}).pop(job.id, None)
        self.spending.release(node_id, job.id)
        self.changes.notify()

    def _most_at(self, node_id: str, job: Job) -> int:
        offers = [one for peer, one in self._offers() if peer.node_id == node_id]
        return max((_most(one.price, job) for one in offers if one.id == job.model.id), default=0)

    def refused(self, node_id: str, seconds: float, why: str) -> None:
        """It has refused a request; others do not ask it for so long.  Who has just ended one of
        ours may still be writing that down: it has room in a moment."""
        now = time.monotonic()
        self.refusals[node_id] = (why, now)
        longest = _MOMENT_SECONDS if self._freed_lately(node_id) else _LONGEST_BUSY
        self._busy[node_id] = now + min(seconds, longest)

    def freed(self, node_id: str) -> None:
        """It has served a request of ours to the end, so it has room, or in a moment."""
        self._busy.pop(node_id, None)
        self._freed[node_id] = time.monotonic()
        self.changes.notify()

    def freed_since(self, node_id: str, moment: float) -> bool:
        """Whether it has served a request of ours to the end after that moment (monotonic)."""
        return self._freed.get(node_id, -math.inf) > moment

    def busy_no_more(self, node_id: str, moment: float) -> bool:
        """Whether it has said after that moment that it is busy, and the time for that is over."""
        _, refused = self.refusals.get(node_id, ("", -math.inf))
        return refused >= moment and self._busy.get(node_id, 0.0) <= time.monotonic()

    def _freed_lately(self, node_id: str) -> bool:
        return self.freed_since(node_id, time.monotonic() - _FREED_SECONDS)

    def at_capacity_with_our_requests(self, job: Job) -> bool:
        """Whether a peer that the job may go to has no room for it while it serves others of ours:
        it will have some."""
        return any(
            self._under_way.get(one.node_id) or self._freed_lately(one.node_id)
            for one in self.of(job, "")
            if one.refuses == _BUSY
        )

    def next_expiry(self) -> float:
        """When the next peer may be asked again that is busy or failed (monotonic; inf: none)."""
        now = time.monotonic()
        ends = [*self._busy.values(), *self._resting.ends()]
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
        prompt = len(str(text)) // _CHARACTERS_A_TOKEN
    if job.inputs is not None:
        return prompt, 0
    made = len(job.output)
    most = _TYPICAL_TOKENS if job.max_tokens is None else job.max_tokens - made
    return prompt + made, max(0, most)


def _cost(prices: Prices, job: Job) -> int:
    return prices.most(*tokens_of(job))


def _most(prices: Prices, job: Job) -> int:
    """As `_cost`, but of a prompt that nobody has counted yet as many tokens as it has bytes: with
    what stands around its messages here there are no fewer."""
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
            (one.get("role"), len(text := one.get("content") or ""), text[:4096])
            for one in job.messages[:2]
        ]
    )
    return hashlib.sha256(f"{job.model.id}\n{job.tenant}\n{begin}".encode()).digest()
