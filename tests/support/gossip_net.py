"""Gossip among a few boxes: frames are carried by hand, time passes when the test says so."""

from __future__ import annotations

from collections import deque
from itertools import pairwise
from random import Random

from pinaivu_box.gossip.adverts import Adverts, Facts, HeldAdvert
from pinaivu_box.gossip.protocol import Gossip
from pinaivu_box.identity import Identity
from pinaivu_box.membership.records import Record
from tests.support.keys import FOUNDER, IDENTITIES
from tests.support.records import NOW, certificate, offer, roster

FACTS = Facts("1.0", ("a:1",), "credits", (offer(),))


class CarriedEffects:
    """One box's effects: frames wait in the net, cuts are done at once."""

    def __init__(self, net: GossipNet, me: str) -> None:
        self.net, self.me = net, me

    def send(self, peer: str, frame: bytes) -> None:
        self.net.waiting.append((self.me, peer, frame))

    def disconnect(self, peer: str, why: str) -> None:
        self.net.cuts.append((self.me, peer, why))
        if other := self.net.boxes.get(peer):
            other.link_down(self.me, lost=False)

    def roster_changed(self) -> None:
        self.net.changes += 1


class GossipNet:
    def __init__(self) -> None:
        self.now, self.changes = 1000.0, 0
        self.boxes: dict[str, Gossip] = {}
        self.waiting: deque[tuple[str, str, bytes]] = deque()
        self.sent: list[tuple[str, str, bytes]] = []
        self.cuts: list[tuple[str, str, str]] = []

    def box(self, identity: Identity, *records: Record, wall: float = NOW) -> Gossip:
        me = identity.node_id
        box = Gossip(
            identity, roster(*records), CarriedEffects(self, me), clock=lambda: self.now,
            wall=lambda: wall + self.now, random=Random(me),
        )  # fmt: skip
        box.facts = FACTS
        self.boxes[me] = box
        return box

    def link(self, one: Gossip, other: Gossip) -> None:
        one.link_up(other.me)
        other.link_up(one.me)
        self.settle()

    def settle(self, lose: bool = False) -> None:
        while self.waiting:
            source, target, frame = self.waiting.popleft()
            self.sent.append((source, target, frame))
            if not lose and target in self.boxes:
                self.boxes[target].receive(source, frame)

    def run(self, seconds: int) -> None:
        for _ in range(seconds):
            self.now += 1.0
            for box in list(self.boxes.values()):
                box.tick()
            self.settle()


def chain(count: int) -> tuple[GossipNet, list[Gossip]]:
    """Boxes in a row, each linked with the next, all members."""
    net = GossipNet()
    records = [certificate(FOUNDER, identity, name="n") for identity in IDENTITIES[1:count]]
    row = [net.box(identity, *records) for identity in IDENTITIES[:count]]
    for one, other in pairwise(row):
        net.link(one, other)
    net.run(2 * count)
    return net, row


def admit(box: Gossip, *records: Record) -> None:
    """The box learns of these as if it had signed them, and tells its links."""
    box.spread(box.roster.admit(records).new)


def fresh_adverts(adverts: Adverts, now: float) -> list[HeldAdvert]:
    """Those that have not expired."""
    return [held for held in adverts._adverts.values() if held.expires_at > now]


def heard_by(box: Gossip) -> set[str]:
    return {held.advert.node_id for held in fresh_adverts(box.adverts, box._clock())}
