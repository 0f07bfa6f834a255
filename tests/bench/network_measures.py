"""One course of events in a simulated network, and what is to be said of it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple
from unittest.mock import patch

from pinaivu_box.identity import Identity, verify
from pinaivu_box.membership import records
from pinaivu_box.membership.records import network_of
from pinaivu_box.membership.roster import Roster
from tests.bench.network_world import (
    EPOCH,
    MEAN_TOKENS,
    MODELS,
    Request,
    SimulatedBox,
    SimulatedNetwork,
    identity,
)
from tests.support.gossip_net import fresh_adverts

WARM_UP, STEADY, NEWCOMER, REVOKED, AFTER = 35.0, 40.0, 30.0, 20.0, 60.0  # seconds
LOAD = 0.6  # of what all engines together can do
VANISH = 0.3


class Figures(NamedTuple):
    """Bytes and messages a second and box; seconds; shares from 0 to 1."""

    boxes: int
    links: float
    bytes_in: float
    bytes_in_worst: float
    bytes_out: float
    bytes_out_worst: float
    messages: float
    known: float  # share of the members whose adverts a box holds, the worst box
    newcomer_member: float
    newcomer_advert: float
    revoked_known: float
    revoked_cut: float
    local: float
    best: float
    quality: float
    at_once: float
    second_try: float
    dead_last: float
    dead_last_single: float
    dead_second_try: list[float]  # by 10 s after they vanished
    unserved: int
    cuts: int


# Name, what is measured, and what it may be at most.
GOALS: list[tuple[str, Callable[[Figures], float], float]] = [
    ("in, mean: at most 20 kB/s", lambda f: f.bytes_in / 1000, 20.0),
    ("out, mean: at most 20 kB/s", lambda f: f.bytes_out / 1000, 20.0),
    ("newcomer a member to all: within 30 s", lambda f: f.newcomer_member, 30.0),
    ("newcomer's advert with all: within 30 s", lambda f: f.newcomer_advert, 30.0),
    ("revocation known to all: within 10 s", lambda f: f.revoked_known, 10.0),
    ("revoked box has no link left: within 10 s", lambda f: f.revoked_cut, 10.0),
    ("members whose advert a box lacks: at most 1 %", lambda f: 100 * (1 - f.known), 1.0),
    ("second tries: at most 10 %", lambda f: 100 * f.second_try, 10.0),
    ("first choice not within 10 % of the best: at most 50 %", lambda f: 100 * (1 - f.best), 50.0),
    ("30 % vanish: all but 1 in 1,000 avoid the dead after 30 s", lambda f: f.dead_last, 30.0),
    ("30 % vanish: second tries from 30 s on: 10 %", lambda f: 100 * f.dead_second_try[3], 10.0),
]  # fmt: skip


# The same record comes to a thousand boxes; each would check it, and here one does.
@patch.object(records, "verify", lru_cache(500_000)(verify))
def simulate(size: int, seed: int = 1, say: Callable[[str], None] = lambda text: None) -> Figures:
    world = SimulatedNetwork(seed)
    network = network_of(identity(0).node_id, b"sim!")
    founder, book = identity(0), Roster(network)
    for number in range(1, size):
        book.certify(founder, identity(number).node_id, f"box{number}", EPOCH, admin=number < 4)
    for number in range(size):
        roster = Roster(network)
        roster.admit(book.records())
        world.box(identity(number), roster)
    boxes = list(world.boxes.values())
    start_requests(world, boxes)
    world.run(WARM_UP)
    say("warm")
    steady = measure_steady(world, boxes)
    say("steady")
    newcomer = measure_newcomer(world, boxes, identity(size), network)
    say("newcomer")
    revoked = measure_revocation(world, boxes, boxes[size // 2])
    say("revocation")
    vanished = measure_vanishing(world)
    cuts = sum(
        count
        for box in boxes
        for why, count in box.cuts.items()
        if why != "too many links" and "revoked" not in why
    )
    figures: tuple[Any, ...] = (*steady[:7], *newcomer, *revoked, *steady[7:], *vanished, cuts)
    return Figures(size, *figures)


def start_requests(world: SimulatedNetwork, boxes: Sequence[SimulatedBox]) -> None:
    """Some boxes are asked ten times as much as others, by a Pareto distribution cut off there."""
    capacity = sum(box.engine.sequences * box.engine.tokens_per_s / MEAN_TOKENS for box in boxes)
    asked = [min(10.0, world.random.paretovariate(1.2)) for _ in boxes]
    for box, share in zip(boxes, asked, strict=True):
        world.arrivals(box, LOAD * capacity * share / sum(asked))


def measure_steady(world: SimulatedNetwork, boxes: Sequence[SimulatedBox]) -> tuple[float, ...]:
    before = [(box.bytes_in, box.bytes_out, box.messages) for box in boxes]
    begin = world.now
    world.run(world.now + STEADY)
    ins, outs, messages = (
        [(after - was[at]) / STEADY for was, after in zip(before, now, strict=True)]
        for at, now in enumerate(
            [[b.bytes_in for b in boxes], [b.bytes_out for b in boxes], [b.messages for b in boxes]]
        )
    )
    known = min(len(fresh_adverts(box.gossip.adverts, world.now)) for box in boxes) / len(boxes)
    links = statistics.mean(len(box.gossip.links) for box in boxes)
    return (
        links, statistics.mean(ins), max(ins), statistics.mean(outs), max(outs),
        statistics.mean(messages), known, *quality([r for r in world.requests if r.at >= begin]),
    )  # fmt: skip


def quality(requests: Sequence[Request]) -> tuple[float, ...]:
    """Shares: local; of those sent away, on a best box; their mean quality; began at once; and of
    all, needed a second try."""
    away = [one for one in requests if one.first and one.first.reason not in ("local", "nobody")]
    judged = [one.quality for one in away if one.quality]
    begun = [one.began - one.at < 0.25 for one in requests if one.began is not None]
    local = sum(bool(one.first and one.first.reason == "local") for one in requests)
    return (
        local / len(requests),
        statistics.mean(value >= 0.9 for value in judged),
        statistics.mean(judged),
        statistics.mean(begun),
        statistics.mean(len(one.tries) > 1 for one in requests),
    )


def measure_newcomer(
    world: SimulatedNetwork, boxes: Sequence[SimulatedBox], newcomer: Identity, network: str
) -> tuple[float, float]:
    """Seconds until every box takes it for a member, and until every box holds its advert."""
    inviter = boxes[len(boxes) // 3]
    made = inviter.gossip.roster.certify(
        inviter.gossip._identity, newcomer.node_id, "new", world.wall()
    )
    roster = Roster(network)
    roster.admit([*inviter.gossip.roster.proof(inviter.id), made])
    box = world.box(newcomer, roster)
    box.engine.models = (MODELS[0],)
    begin = world.now
    inviter.gossip.spread([made])
    world.connect(box, inviter)
    member = until(world, NEWCOMER, lambda: all(box.id in b.gossip.roster.members() for b in boxes))
    heard = until(world, NEWCOMER, lambda: all(b.gossip.adverts.get(box.id) for b in boxes))
    whole = until(world, NEWCOMER, lambda: len(box.gossip.roster) == len(inviter.gossip.roster))
    return member - begin, max(heard, whole) - begin


def measure_revocation(
    world: SimulatedNetwork, boxes: Sequence[SimulatedBox], out: SimulatedBox
) -> tuple[float, float]:
    """Seconds until every box knows, and until it has no link."""
    begin = world.now
    founder = boxes[0].gossip
    made = founder.roster.revoke(founder._identity, out.id, world.wall())
    founder.spread([made])
    rest = [box for box in world.boxes.values() if box is not out]
    known = until(
        world, REVOKED, lambda: all(out.id not in b.gossip.roster.members() for b in rest)
    )
    cut = until(world, REVOKED, lambda: not any(out.id in b.gossip.links for b in rest))
    out.alive = False
    return known - begin, cut - begin


def measure_vanishing(world: SimulatedNetwork) -> tuple[float, float, list[float], int]:
    """Seconds until the last request but one in a thousand, and the very last, went to a dead box;
    shares of requests with a second try; how many were never begun."""
    alive = [box for box in world.boxes.values() if box.alive]
    dead = world.random.sample(alive[1:], round(VANISH * len(alive)))
    begin = world.now
    for box in dead:
        world.kill(box)
    world.run(begin + AFTER)
    gone = {box.id for box in dead}
    lost = [one for one in world.requests if one.at >= begin]
    first_to_dead = sorted(one.at - begin for one in lost if one.tries and one.tries[0][1] in gone)
    tenths = [
        [len(one.tries) > 1 for one in lost if at <= one.at - begin < at + 10]
        for at in range(0, round(AFTER) - 10, 10)
    ]
    second = [statistics.mean(part) if part else 0.0 for part in tenths]
    # Who came in the last second may still be asking around.
    unserved = sum(not one.tries for one in lost if one.at < world.now - 1)
    last = first_to_dead[-1] if first_to_dead else 0.0
    most = (
        first_to_dead[max(0, len(first_to_dead) - 1 - len(lost) // 1000)] if first_to_dead else 0.0
    )
    return most, last, second, unserved


def until(world: SimulatedNetwork, most: float, holds: Callable[[], bool]) -> float:
    """The moment from which it holds, to a tenth of a second; infinite if it never does."""
    end = world.now + most
    while world.now < end:
        if holds():
            return world.now
        world.run(world.now + 0.1)
    return float("inf")
