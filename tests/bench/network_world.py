"""Boxes on a virtual clock: the product's gossip, adverts, rosters and router, over links that only
take time.  Nothing here measures; see `network_measures`."""

from __future__ import annotations

import hashlib
import heapq
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import count
from random import Random
from typing import Any

from nacl.signing import SigningKey

from pinaivu_box.amount import Prices
from pinaivu_box.gossip import topology
from pinaivu_box.gossip.adverts import Facts, ModelLoad, Offer
from pinaivu_box.gossip.protocol import Gossip
from pinaivu_box.identity import Identity
from pinaivu_box.membership.records import key_of
from pinaivu_box.membership.roster import Roster
from pinaivu_box.network.network import LOAD_QUERY_SECONDS
from pinaivu_box.routing.circuit_breaker import CircuitBreaker
from pinaivu_box.routing.router import Candidate, Decision, RoutingRequest, route
from tests.support.gossip_net import fresh_adverts

OVERHEAD_BYTES = 60  # UDP, IP and QUIC around a frame
# To make a link, each way: as measured with iroh 1.2.0 on loopback (6,700 and 5,585 in 13 and 11
# datagrams), and UDP and IP around them.
LINK_BYTES = 6500
NOTICED_SECONDS = 4.0  # until heartbeats tell that a link is dead
CONNECT_SECONDS = 3.0  # until somebody who does not answer is given up
REDIAL_SECONDS = 30.0
EPOCH = 1_800_000_000.0
MODELS = ("m:1", "m:2", "m:3", "m:4", "m:5")
TOKENS = 1000  # that a request may take, prompt and answer
MEAN_TOKENS = 600  # that are made
OWN_MODELS = 0.7  # of requests are for a model that the box has itself
JUDGED = 0.25  # of requests are compared with what would have been best


@dataclass
class SimulatedEngine:
    """`sequences` requests run at a time, each for a while; more wait."""

    sequences: int
    ttft_ms: int
    tokens_per_s: int
    price: str
    models: tuple[str, ...]
    running: int = 0
    queue: list[Callable[[], None]] = field(default_factory=list)

    def offer(self, model: str) -> Offer:
        free = max(0, self.sequences - self.running)
        return Offer(
            model, digest(model), self.sequences, free, free * 4096, len(self.queue),
            self.ttft_ms, self.tokens_per_s, (self.price, self.price, self.price),
        )  # fmt: skip


@lru_cache
def digest(model: str) -> bytes:
    return hashlib.sha256(model.encode()).digest()


@dataclass
class Request:
    """`tries`: when it was sent to whom.  `quality`: the first choice's score / the best score,
    both by what was really so at that moment; 0 if that was not looked at."""

    at: float
    model: str
    tries: list[tuple[float, str]] = field(default_factory=list)
    began: float | None = None
    quality: float = 0.0
    first: Decision | None = None


class SimulatedBox:
    def __init__(
        self, world: SimulatedNetwork, identity: Identity, roster: Roster, engine: SimulatedEngine
    ) -> None:
        self.world, self.engine, self.id = world, engine, identity.node_id
        self.key = key_of(self.id)
        self.alive, self.bytes_in, self.bytes_out, self.messages = True, 0, 0, 0
        self.random = Random(world.random.random())
        self.gossip = Gossip(
            identity, roster, self, clock=world.clock, wall=world.wall, random=self.random,
        )  # fmt: skip
        self.breaker = CircuitBreaker(world.clock, self.random)
        self.sent: dict[str, list[float]] = {}
        self.not_yet: dict[str, float] = {}  # whom not to call until when
        self.cuts: Counter[str] = Counter()
        self.in_use: Counter[str] = Counter()  # links that carry requests
        self.calls = 0  # links made for a request
        self.gossip.facts = self.facts()
        world.after(self.random.random(), self.tick)

    # Effects of the gossip

    def send(self, peer: str, frame: bytes) -> None:
        self.world.transmit(self, self.world.boxes[peer], frame)

    def disconnect(self, peer: str, why: str) -> None:
        self.cuts[why] += 1
        other = self.world.boxes[peer]
        self.world.after(
            self.world.latency(self, other), other.gossip.link_down, self.id, lost=False
        )

    def roster_changed(self) -> None:
        self.world.on_change(self)

    # Life

    def tick(self) -> None:
        if not self.alive:
            return
        self.gossip.facts = self.facts()
        self.gossip.tick()
        self.dial()
        self.world.after(1.0, self.tick)

    def facts(self) -> Facts:
        return Facts(
            "1.0", ("192.168.100.100:4002",), "credits",
            tuple(self.engine.offer(model) for model in self.engine.models),
        )  # fmt: skip

    def busy(self) -> None:
        """A request has begun or ended here."""
        self.gossip.facts = self.facts()
        self.gossip.push_load()

    def dial(self) -> None:
        now, members, links = self.world.now, self.gossip.roster.members(), self.gossip.links
        if self.id not in members or topology.MIN_LINKS <= len(links) <= topology.MAX_LINKS:
            return
        busy = {*links, *(node for node, until in self.not_yet.items() if until > now)}
        busy |= {node for node in members if self.gossip.adverts.gone(node)}
        for node in topology.to_dial(self.id, members, busy, len(links), self.random):
            self.not_yet[node] = now + REDIAL_SECONDS
            self.world.connect(self, self.world.boxes[node])
        idle = [node for node in links if not self.in_use[node]]
        for node in topology.to_drop(members, idle, len(links), self.random):
            self.gossip.link_down(node, lost=False)
            self.disconnect(node, "too many links")

    # Requests

    def candidates(self, model: str) -> list[Candidate]:
        """As `gateway.candidates`."""
        made = []
        if model in self.engine.models:
            made.append(candidate(self, self.engine.offer(model), known=True))
        for held in fresh_adverts(self.gossip.adverts, self.world.now):
            for offer in held.advert.models:
                if held.advert.node != self.key and offer.id == model:
                    node = held.advert.node_id
                    now, linked = self.gossip.loads.of(node).get(model), node in self.gossip.links
                    heard = now.at if now else held.sent_at
                    how: dict[str, Any] = {
                        "load": now.load if now else offer,
                        "known": now is not None,
                        "sent": sum(at >= heard for at in self.sent.get(node, ())),
                        "tripped": self.breaker.why(node),
                        "gone": not linked and (now is None or self.gossip.adverts.gone(node)),
                    }
                    made.append(candidate(self.world.boxes[node], offer, self, **how))
        return made

    def ask(self, request: Request, *, looked: bool = False) -> None:
        """Route it, asking around if that helps, and send it there; again, if that fails."""
        tried = [node for _, node in request.tries]
        wanted = RoutingRequest(
            request.model, digest(request.model).hex(), TOKENS, "credits", tried=tried
        )
        found = self.candidates(request.model)
        decision = route(found, wanted, self.random)
        if not looked and decision.unsure:
            self.look(request)
            return
        if not tried:
            self.world.judge(self, request, decision)
        if decision.node_id is None or len(tried) > 4:
            return
        other = self.world.boxes[decision.node_id]
        request.tries.append((self.world.now, other.id))
        if other is self:
            self.begin(self, request)
            return
        self.breaker.sent(other.id)
        self.sent.setdefault(other.id, []).append(self.world.now)
        self.use(other, 1)
        delay = self.world.latency(self, other)
        if not other.alive:
            self.world.after(CONNECT_SECONDS, self.failed, other, request)
        elif other.id in self.gossip.links:
            self.world.after(delay, other.begin, self, request)
        else:
            self.calls += 1
            self.world.connect(self, other)
            self.world.after(4 * delay, other.begin, self, request)

    def look(self, request: Request) -> None:
        """As `Network.look`: until most links have said what they know."""
        self.gossip.query_load(request.model)
        end = self.world.now + LOAD_QUERY_SECONDS

        def enough() -> None:
            if not self.gossip.loads.waiting(request.model) or self.world.now >= end:
                self.ask(request, looked=True)
            else:
                self.world.after(0.005, enough)

        enough()

    def use(self, other: SimulatedBox, count: int) -> None:
        self.in_use[other.id] += count
        other.in_use[self.id] += count

    def failed(self, other: SimulatedBox, request: Request) -> None:
        self.answered(other)
        self.breaker.failed(other.id)
        self.ask(request)

    def refused(self, other: SimulatedBox, request: Request) -> None:
        """It is full, which is no failure."""
        self.answered(other)
        self.ask(request)

    def answered(self, other: SimulatedBox) -> None:
        self.use(other, -1)
        if sent := self.sent.get(other.id):
            sent.pop(0)

    def begin(self, by: SimulatedBox, request: Request) -> None:
        """A guest waits here only if few do; own requests wait as long as it takes."""
        if not self.alive:
            self.world.after(CONNECT_SECONDS, by.failed, self, request)
        elif self.engine.running < self.engine.sequences:
            self.run(by, request)
        elif by is self or len(self.engine.queue) < self.engine.sequences:
            self.engine.queue.append(lambda: self.run(by, request))
            self.busy()
        else:
            self.world.after(self.world.latency(self, by), by.refused, self, request)

    def run(self, by: SimulatedBox, request: Request) -> None:
        self.engine.running += 1
        self.busy()
        request.began = self.world.now
        tokens = self.random.expovariate(1 / MEAN_TOKENS)
        self.world.after(tokens / self.engine.tokens_per_s, self.done, by)

    def done(self, by: SimulatedBox) -> None:
        self.engine.running -= 1
        if by is not self and self.alive:
            by.answered(self)
            by.breaker.served(self.id)
        if self.engine.queue and self.alive:
            self.engine.queue.pop(0)()
        elif self.alive:
            self.busy()


def candidate(
    of: SimulatedBox,
    offer: Offer,
    seen_by: SimulatedBox | None = None,
    load: ModelLoad | None = None,
    **more: Any,
) -> Candidate:
    """As `seen_by` sees it, who knows the round trip where there is a link; None: it is local."""
    rtt: float | None = 0.0
    load = load or offer.load
    if seen_by is not None:
        linked = of.id in seen_by.gossip.links
        rtt = 2000 * of.world.latency(of, seen_by) if linked else None
    return Candidate(
        of.id, offer.id, offer.digest.hex(), offer.sequences, load, offer.ttft_ms,
        offer.tokens_per_s, cost(offer.prices), "credits",
        rtt_ms=rtt, local=seen_by is None, **more,
    )  # fmt: skip


@lru_cache
def cost(prices: tuple[str, str, str]) -> int:
    return Prices(prices[0], prices[2], prices[1]).cost(400, 0, 200)


class SimulatedNetwork:
    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.now = 0.0
        self.boxes: dict[str, SimulatedBox] = {}
        self.requests: list[Request] = []
        self.on_change: Callable[[SimulatedBox], None] = lambda box: None
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...], dict[str, Any]]]
        self._events = []
        self._count = count()
        self._places: dict[str, tuple[float, float]] = {}

    def clock(self) -> float:
        return self.now

    def wall(self) -> float:
        return EPOCH + self.now

    def after(self, delay: float, act: Callable[..., None], *args: Any, **more: Any) -> None:
        heapq.heappush(self._events, (self.now + delay, next(self._count), act, args, more))

    def run(self, until: float) -> None:
        while self._events and self._events[0][0] <= until:
            self.now, _, act, args, more = heapq.heappop(self._events)
            act(*args, **more)
        self.now = until

    def box(self, identity: Identity, roster: Roster) -> SimulatedBox:
        pick = self.random
        engine = SimulatedEngine(
            sequences=pick.choice((2, 4, 8)),
            ttft_ms=pick.choice((60, 120, 250, 500)),
            tokens_per_s=pick.choice((15, 30, 60)),
            price=pick.choice(("0.001", "0.002", "0.003")),
            models=tuple(sorted(pick.sample(MODELS, pick.randint(1, 3)))),
        )
        self._places[identity.node_id] = (pick.random(), pick.random())
        made = self.boxes[identity.node_id] = SimulatedBox(self, identity, roster, engine)
        return made

    def latency(self, one: SimulatedBox, other: SimulatedBox) -> float:
        """Seconds one way: 2 to 72 ms by how far apart they are."""
        (x, y), (u, v) = self._places[one.id], self._places[other.id]
        return 0.002 + 0.05 * math.hypot(x - u, y - v)

    def connect(self, one: SimulatedBox, other: SimulatedBox) -> None:
        for box in (one, other):
            box.bytes_out += LINK_BYTES
            box.bytes_in += LINK_BYTES

        def stand() -> None:
            if one.alive and other.alive and other.id not in one.gossip.links:
                one.gossip.link_up(other.id)
                other.gossip.link_up(one.id)

        self.after(3 * self.latency(one, other), stand)

    def transmit(self, one: SimulatedBox, other: SimulatedBox, frame: bytes) -> None:
        one.bytes_out += len(frame) + OVERHEAD_BYTES
        one.messages += 1

        def arrive() -> None:
            if other.alive and one.id in other.gossip.links:
                other.bytes_in += len(frame) + OVERHEAD_BYTES
                other.gossip.receive(one.id, frame)

        self.after(self.latency(one, other), arrive)

    def kill(self, box: SimulatedBox) -> None:
        box.alive = False
        for node in list(box.gossip.links):
            delay = NOTICED_SECONDS - self.random.random()
            self.after(delay, self.boxes[node].gossip.link_down, box.id, lost=True)

    def arrivals(self, box: SimulatedBox, per_second: float) -> None:
        """Requests come to a box for ever, at random moments."""

        def come() -> None:
            if box.alive:
                own = box.random.random() < OWN_MODELS
                model = box.random.choice(box.engine.models if own else MODELS)
                request = Request(self.now, model)
                self.requests.append(request)
                box.ask(request)
                self.after(box.random.expovariate(per_second), come)

        self.after(box.random.expovariate(per_second), come)

    def judge(self, by: SimulatedBox, request: Request, decision: Decision) -> None:
        """How good the choice was, had one known everything at that moment."""
        request.first = decision
        if decision.node_id in (None, by.id) or self.random.random() > JUDGED:
            return
        truth = [
            replace(
                candidate(box, box.engine.offer(request.model), None if box is by else by),
                rtt_ms=0.0 if box is by else 2000 * self.latency(box, by),
            )
            for box in self.boxes.values()
            if box.alive and request.model in box.engine.models
        ]
        wanted = RoutingRequest(
            request.model, None, TOKENS, "credits", policy="cheapest"
        )  # compares all
        scored = route(truth, wanted, Random(0)).candidates
        mine = [one.score for one in scored if one.node_id == decision.node_id]
        request.quality = mine[0] / scored[0].score if mine else 0.0


def identity(number: int) -> Identity:
    return Identity(SigningKey(hashlib.sha256(b"sim%d" % number).digest()))
