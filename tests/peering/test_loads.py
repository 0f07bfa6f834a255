"""How busy boxes are: told over links as it changes, and passed on once to whoever asks."""

from __future__ import annotations

from msgspec.structs import replace

from pinaivu_box.gossip.adverts import ModelLoad
from pinaivu_box.gossip.frames import (
    MAX_LOADS,
    HaveRecords,
    LoadQuery,
    LoadReport,
    LoadUpdate,
    RosterDigest,
    decode,
    encode,
)
from pinaivu_box.gossip.loads import REPORT_SECONDS
from pinaivu_box.gossip.protocol import Gossip
from pinaivu_box.membership.records import key_of
from tests.support.gossip_net import FACTS, GossipNet, admit, chain, heard_by
from tests.support.keys import FOUNDER, IDENTITIES
from tests.support.records import certificate

MODEL = FACTS.models[0].id
FULL = ModelLoad(0, 0, 3)


def fill(net: GossipNet, box: Gossip, queue: int = 3) -> None:
    box.facts = replace(
        FACTS, models=(replace(FACTS.models[0], sequences_free=0, kv_free=0, queue=queue),)
    )
    box.push_load()
    net.settle()


def knows(box: Gossip, of: Gossip) -> ModelLoad | None:
    found = box.loads.of(of.me).get(MODEL)
    return found.load if found else None


def test_neighbours_get_load_changes_at_once_and_others_on_query() -> None:
    net, row = chain(4)
    serials = [row[0].adverts.get(one.me) for one in row]
    fill(net, row[2])
    assert knows(row[1], row[2]) == knows(row[3], row[2]) == FULL
    assert knows(row[0], row[2]) is None
    row[0].query_load(MODEL)
    assert row[0].loads.waiting(MODEL)
    net.settle()
    assert not row[0].loads.waiting(MODEL)
    assert knows(row[0], row[2]) == FULL
    assert knows(row[0], row[3]) is None  # what is passed on is passed on once
    assert serials == [row[0].adverts.get(one.me) for one in row]  # all without an advert
    assert not net.cuts


def test_reports_of_others_expire_soon_and_those_of_a_neighbour_end_with_its_link() -> None:
    net, row = chain(3)
    fill(net, row[2])
    row[0].query_load(MODEL)
    net.settle()
    net.now += REPORT_SECONDS + 0.1
    assert knows(row[0], row[2]) is None
    assert knows(row[1], row[2]) == FULL
    row[1].link_down(row[2].me, lost=True)
    assert knows(row[1], row[2]) is None


def test_a_new_link_begins_with_the_load_as_it_is() -> None:
    net, row = chain(2)
    fill(net, row[1])
    new = net.box(IDENTITIES[5], certificate(FOUNDER, IDENTITIES[5], name="n"))
    admit(row[0], certificate(FOUNDER, IDENTITIES[5], name="n"))
    net.link(new, row[1])
    assert knows(new, row[1]) == FULL


def test_a_crowd_of_requests_makes_no_crowd_of_frames() -> None:
    net, row = chain(2)
    net.sent.clear()
    for queue in range(1, 200):
        fill(net, row[1], queue)
    assert len(net.sent) < 10
    net.run(2)
    assert knows(row[0], row[1]) == ModelLoad(0, 0, 199)


def test_an_unrequested_load_report_is_ignored() -> None:
    net, row = chain(3)
    lie = encode(LoadReport(MODEL, ((key_of(row[2].me), FULL),)))
    row[0].receive(row[1].me, lie)
    assert knows(row[0], row[2]) is None
    row[0].query_load(MODEL)
    net.settle()
    row[0].receive(row[1].me, lie)  # it has answered already
    assert knows(row[0], row[2]) == ModelLoad(
        FACTS.models[0].sequences_free, FACTS.models[0].kv_free, FACTS.models[0].queue
    )


def test_the_number_of_models_of_a_peer_is_bounded() -> None:
    _, row = chain(2)
    for number in range(20):
        named = tuple((f"m{number}:{n}", FULL) for n in range(MAX_LOADS))
        row[0].receive(row[1].me, encode(LoadUpdate(named)))
    assert len(row[0].loads.of(row[1].me)) == MAX_LOADS


def test_a_box_that_knows_no_loads_gets_none_and_all_else() -> None:
    """Its Digest has nothing after the roster's."""
    net, row = chain(2)
    old = net.box(IDENTITIES[6], certificate(FOUNDER, IDENTITIES[6], name="n"))
    admit(row[0], certificate(FOUNDER, IDENTITIES[6], name="n"))
    old._digest = lambda: RosterDigest(old.roster.digest())  # type: ignore[method-assign]
    net.link(old, row[0])
    net.run(8)
    fill(net, row[0])
    row[0].query_load(MODEL)
    net.settle()
    told = [decode(frame) for _, target, frame in net.sent if target == old.me]
    assert heard_by(old) >= {one.me for one in row}
    assert not [one for one in told if isinstance(one, LoadUpdate | LoadQuery)]


def test_equal_adverts_are_not_sent() -> None:
    net, row = chain(5)
    net.sent.clear()
    net.link(row[0], row[4])
    assert not [frame for _, _, frame in net.sent if isinstance(decode(frame), HaveRecords)]
