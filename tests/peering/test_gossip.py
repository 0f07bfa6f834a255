"""Gossip among a few boxes: frames are carried by hand, time passes when the test says so."""

from __future__ import annotations

from contextlib import suppress
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import msgpack
from msgspec.structs import replace

from pinaivu_box.gossip import topology
from pinaivu_box.gossip.frames import (
    MAX_GIVE_BYTES,
    MAX_IDS,
    GivenRecord,
    GiveRecords,
    HaveRecords,
    RosterDigest,
    WantRecords,
    batches,
    decode,
    encode,
)
from pinaivu_box.gossip.protocol import Gossip, RecordRequests
from pinaivu_box.membership.records import Invalid
from tests.support.gossip_net import FACTS, GossipNet, admit, chain, heard_by
from tests.support.keys import FOUNDER, IDENTITIES, known_identity
from tests.support.records import NOW, advert, certificate, gone, offer, revocation


def test_adverts_reach_every_box_of_a_chain() -> None:
    net, row = chain(6)
    for box in row:
        assert heard_by(box) == {one.me for one in row}
    net.run(60)
    for box in row:
        assert heard_by(box) == {one.me for one in row}
    assert not net.cuts


def test_a_restored_link_brings_the_adverts_sent_meanwhile() -> None:
    """It does not wait until that is said anew, when the old may have expired."""
    net, row = chain(2)
    one, other = row
    one.link_down(other.me, lost=True)
    other.link_down(one.me, lost=True)
    net.run(6)
    assert serials(one, row) != serials(other, row)
    net.link(one, other)
    assert serials(one, row) == serials(other, row) == {box.me: box._serial for box in row}


def serials(box: Gossip, row: list[Gossip]) -> dict[str, int]:
    found = {one.me: box.adverts.get(one.me) for one in row}
    return {node: held.advert.serial for node, held in found.items() if held}


def test_a_newcomer_shows_its_certificate_and_is_known_to_all() -> None:
    net, row = chain(4)
    new = IDENTITIES[6]
    made = row[0].roster.certify(FOUNDER, new.node_id, "new", NOW)
    # Not even told: it carries the certificate itself, to a box that its inviter has no link with.
    box = net.box(new, made)
    net.link(box, row[3])
    assert all(new.node_id in one.roster.members() for one in row)
    assert len(box.roster) == len(row[0].roster)
    net.run(6)
    assert heard_by(box) == {one.me for one in row} | {new.node_id}
    assert heard_by(row[0]) == heard_by(box)
    assert not net.cuts


def test_a_revoked_box_is_cut_off_by_all_and_stays_out() -> None:
    net, row = chain(5)
    out = row[2]
    row[0].spread([row[0].roster.revoke(FOUNDER, out.me, NOW, "sold")])
    net.settle()
    assert row[1].me not in out.links and out.me not in row[1].links
    assert (row[1].me, out.me) in [cut[:2] for cut in net.cuts]
    assert "revoked it (sold)" in net.cuts[0][2]
    net.link(row[3], row[1])  # round it: the rest learns
    net.run(12)
    assert not out.links
    assert all(out.me not in one.roster.members() for one in (row[0], row[1], row[3], row[4]))
    net.link(out, row[4])
    net.run(7)
    assert out.me not in row[4].links
    assert out.me not in heard_by(row[4])


def test_a_box_that_is_no_member_gets_no_adverts_and_is_disconnected() -> None:
    net, row = chain(2)
    stranger = net.box(IDENTITIES[7])
    net.sent.clear()
    net.link(stranger, row[1])
    row[1].receive(stranger.me, encode(RosterDigest(b"0" * 16)))
    row[1].receive(stranger.me, encode(WantRecords(news=b"".join(row[1].adverts.ids()))))
    net.settle()
    told = [decode(frame) for source, target, frame in net.sent if target == stranger.me]
    # It gets the certificates of whom it called, and no adverts, digests or other members.
    assert all(isinstance(one, GiveRecords) and len(one.records) == 1 for one in told)
    net.run(7)
    assert (row[1].me, stranger.me, "no member has certified it") in net.cuts


@pytest.mark.parametrize(
    ("frame", "why"),
    [
        (b"", "an invalid frame"),
        (b"\xff" * 100, "an invalid frame"),
        (b"\x91" * 100_000, "an invalid frame"),
        (encode(HaveRecords(news=b"1234567")), "half an id"),
        (msgpack.encode(["have", b"", b"1" * 8 * (MAX_IDS + 1)]), "an invalid frame"),
        (
            encode(
                GiveRecords(
                    (GivenRecord(certificate(FOUNDER, IDENTITIES[5], signed_by=IDENTITIES[1])),)
                )
            ),
            "signature",
        ),
        (
            encode(
                GiveRecords((GivenRecord(advert(IDENTITIES[1], 1, signed_by=IDENTITIES[2])[1]),))
            ),
            "signature",
        ),
        (
            encode(
                GiveRecords((GivenRecord(advert(IDENTITIES[1], 1, network="net_" + "0" * 72)[1]),))
            ),
            "network",
        ),
    ],
)
def test_invalid_frames_end_the_link(frame: bytes, why: str) -> None:
    net, (one, other) = chain(2)
    one.receive(other.me, frame)
    assert other.me not in one.links and why in net.cuts[0][2]


@settings(max_examples=100)
@given(st.binary(max_size=300))
def test_garbage_is_invalid_and_nothing_else(frame: bytes) -> None:
    with suppress(Invalid):
        read = decode(frame)
        assert decode(encode(read)) == read


def test_a_peer_that_sends_too_much_is_cut_off() -> None:
    net, (one, other) = chain(2)
    frame = encode(HaveRecords(news=b"12345678" * MAX_IDS))
    for _ in range(300):
        one.receive(other.me, frame)
    assert net.cuts[0] == (one.me, other.me, "it sends too much")


def test_requests_to_one_link_are_limited() -> None:
    asking = RecordRequests()
    took = sum(
        asking.offered("a", number.to_bytes(8, "big"), 0.0) for number in range(10 * MAX_IDS)
    )
    assert took == MAX_IDS and len(asking._pending) == MAX_IDS
    assert asking.offered("b", b"another!", 0.0)


def test_a_peer_that_does_not_answer_is_not_waited_for() -> None:
    asking = RecordRequests()
    assert asking.offered("a", b"1", 0.0)
    assert not asking.offered("b", b"1", 0.1) and not asking.offered("c", b"1", 0.2)
    assert asking.retry(2.9, {"a", "b", "c"}) == {}
    assert asking.retry(3.1, {"a", "c"}) == {"c": [b"1"]}  # b's link is gone
    assert list(asking.answered(b"1")) == []
    asking.offered("a", b"2", 10.0)
    assert asking.retry(20.0, {"a"}) == {} and not asking._pending and not asking._count


def test_lost_records_are_found_by_comparing_rosters() -> None:
    net, row = chain(3)
    row[0].spread([row[0].roster.certify(FOUNDER, known_identity(50).node_id, "x", NOW)])
    net.settle(lose=True)
    assert len(row[1].roster) < len(row[0].roster)
    net.run(25)
    assert len({one.roster.digest() for one in row}) == 1


def test_records_of_unknown_signers_wait_for_their_certificate() -> None:
    net, row = chain(2)
    early = certificate(IDENTITIES[5], IDENTITIES[6])
    row[1].receive(row[0].me, encode(GiveRecords((GivenRecord(early),))))
    assert not net.cuts and len(row[1].roster) == 1
    row[1].receive(
        row[0].me,
        encode(GiveRecords((GivenRecord(early), GivenRecord(certificate(FOUNDER, IDENTITIES[5]))))),
    )
    assert IDENTITIES[6].node_id in row[1].roster.members()


def test_changes_are_advertised_at_once_and_at_a_limited_rate() -> None:
    net, row = chain(2)
    admit(row[0], *[certificate(FOUNDER, known_identity(200 + number)) for number in range(98)])
    net.settle()
    net.run(20)
    serials = set()
    for number in range(100):
        row[0].facts = replace(FACTS, draining=number % 2 > 0)
        net.run(1)
        serials.add(row[0]._serial)
    assert 20 <= len(serials) <= 30  # a change a second, but 100 boxes are to speak every 4 s
    row[0].facts = replace(FACTS, draining=False)
    net.run(20)
    row[0].facts = replace(FACTS, draining=True)
    net.run(1)
    held = row[1].adverts.get(row[0].me)
    assert held is not None and held.advert.draining


def test_a_small_move_of_load_is_no_news() -> None:
    assert FACTS.gist() == replace(FACTS, models=(offer(sequences_free=3),)).gist()
    assert FACTS.gist() != replace(FACTS, models=(offer(sequences_free=0),)).gist()


def test_a_lost_box_is_reported_gone_and_refutes_it() -> None:
    net, row = chain(4)
    middle = row[2]
    for other in (row[1], row[3]):
        other.link_down(middle.me, lost=True)
    net.boxes.pop(middle.me)
    net.run(3)
    assert row[0].adverts.gone(middle.me)
    # It was only its links; it comes back.
    net.boxes[middle.me] = middle
    for other in (row[1], row[3]):
        middle.link_down(other.me, lost=False)
    net.link(middle, row[3])
    net.link(middle, row[1])
    net.run(6)
    assert not row[0].adverts.gone(middle.me)


def test_a_false_report_of_a_lost_box_delays_it_by_seconds() -> None:
    net, row = chain(5)
    net.run(3)
    held = row[0].adverts.get(row[3].me)
    assert held is not None
    lie = gone(IDENTITIES[1], IDENTITIES[3], held.advert.serial)[1]
    row[0].receive(row[1].me, encode(GiveRecords((GivenRecord(lie),))))
    assert row[0].adverts.gone(row[3].me)
    row[4].receive(row[3].me, encode(GiveRecords((GivenRecord(lie),))))
    assert not row[4].adverts.gone(row[3].me)  # it has a link with it and knows better
    row[3].receive(row[4].me, encode(GiveRecords((GivenRecord(lie),))))
    net.run(5)
    assert not row[0].adverts.gone(row[3].me)
    far = gone(IDENTITIES[1], IDENTITIES[3], 2**53 - 1)[1]
    row[3].receive(row[4].me, encode(GiveRecords((GivenRecord(far),))))
    assert row[3]._serial < 2**53 - 1  # nobody can use up its serials


def test_a_box_that_lost_all_its_links_reports_no_box_as_gone() -> None:
    net, row = chain(3)
    middle = row[1]
    for other in (row[0], row[2]):
        middle.link_down(other.me, lost=True)
    middle.tick()
    net.now += 2
    middle.tick()
    assert middle.adverts.get(row[0].me) and not middle.adverts.gone(row[0].me)


def test_adverts_of_a_box_whose_clock_went_back_a_day_are_accepted() -> None:
    net, row = chain(3)
    old = row[0]
    for other in (row[1],):
        other.link_down(old.me, lost=False)
    again = net.box(FOUNDER, *old.roster.records(), wall=NOW - 86400)
    net.link(again, row[1])
    net.run(8)
    held = row[2].adverts.get(again.me)
    assert held is not None and held.advert.serial == again._serial > old._serial
    assert held.advert.at < old._wall() * 1000 - 86_000_000
    assert again.me in heard_by(row[2])


def test_adverts_of_a_box_whose_clock_was_a_year_ahead_are_accepted() -> None:
    """Also if it was away until its last advert had expired everywhere: who remembers only that
    there was a newer one shows it to the box itself, which goes on from there."""
    net = GossipNet()
    records = [certificate(FOUNDER, one, name="n") for one in IDENTITIES[1:3]]
    ahead = net.box(FOUNDER, *records, wall=NOW + 400 * 86400)
    others = [net.box(one, *records) for one in IDENTITIES[1:3]]
    net.link(ahead, others[0])
    net.link(*others)
    net.run(8)
    assert all(ahead.me in heard_by(box) for box in others)
    for box in (ahead, others[0]):
        other = others[0] if box is ahead else ahead
        box.link_down(other.me, lost=False)
    del net.boxes[ahead.me]
    net.run(700)
    assert all(box.adverts.get(ahead.me) is None for box in others)
    right = net.box(FOUNDER, *records)
    net.link(right, others[0])
    net.run(8)
    assert right._serial > ahead._serial > NOW + 399 * 86_400_000
    assert all(right.me in heard_by(box) for box in others)


def test_records_go_in_frames_that_fit() -> None:
    record = advert(IDENTITIES[1], 1)[1]
    frames = [encode(frame) for frame in batches([GivenRecord(record)] * 3000)]
    given = [decode(frame) for frame in frames]
    assert sum(len(one.records) for one in given if isinstance(one, GiveRecords)) == 3000
    assert len(frames) > 1 and max(map(len, frames)) < 2 * MAX_GIVE_BYTES


def test_a_revocation_that_comes_before_its_certificate_counts() -> None:
    _, row = chain(2)
    for record in (revocation(FOUNDER, IDENTITIES[5]), certificate(FOUNDER, IDENTITIES[5])):
        row[1].receive(row[0].me, encode(GiveRecords((GivenRecord(record),))))
    assert IDENTITIES[5].node_id not in row[1].roster.members() and len(row[1].roster) == 3


def test_few_are_all_linked_and_many_keep_a_handful() -> None:
    few = [f"n{number}" for number in range(topology.MAX_FULL_MESH)]
    many = [f"n{number}" for number in range(1000)]
    assert topology.to_dial("n0", few, ["n1"], 1, Random(1)) == sorted(set(few) - {"n0", "n1"})
    dialled = topology.to_dial("n0", many, ["n1", "n2"], 2, Random(1))
    assert len(dialled) == topology.MIN_LINKS - 2 and not {"n0", "n1", "n2"} & set(dialled)
    assert topology.to_dial("n0", many, [], topology.MIN_LINKS, Random(1)) == []
    assert len(topology.to_drop(many, many[:30], 30, Random(1))) == 30 - topology.MAX_LINKS
    assert topology.to_drop(few, few, 30, Random(1)) == []
