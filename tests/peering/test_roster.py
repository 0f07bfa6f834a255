"""Membership: the same verdict in any order, and no way back for who was revoked."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pinaivu_box.membership import roster as rosters
from pinaivu_box.membership.records import Record, record_id
from pinaivu_box.membership.roster import MAX_INVITED, Roster
from tests.support.keys import FOUNDER, IDENTITIES, NETWORK, OTHER_NETWORK, known_identity
from tests.support.records import NOW, certificate, revocation, roster

who = st.integers(0, 7).map(IDENTITIES.__getitem__)
certificates = st.builds(
    certificate,
    who,
    who,
    serial=st.integers(1, 3),
    admin=st.booleans(),
    epoch=st.sampled_from([0, 0, 0, 1, 2]),
)
revocations = st.builds(revocation, who, who, epoch=st.sampled_from([0, 0, 1]))
histories = st.lists(st.one_of(certificates, certificates, revocations), max_size=25)


def opinion(of: Roster) -> tuple[object, ...]:
    verdicts = [of.member(one.node_id)[0::2] for one in IDENTITIES]
    return sorted(map(record_id, of.records())), of.digest(), verdicts, of.members()


def merged(*rosters: Roster) -> Roster:
    made = Roster(NETWORK)
    for one in rosters:
        made.admit(one.records())
    return made


@settings(max_examples=60)
@given(histories, histories, histories)
def test_merging_is_commutative_associative_and_idempotent(
    first: list[Record], second: list[Record], third: list[Record]
) -> None:
    a, b, c = roster(*first), roster(*second), roster(*third)
    assert opinion(merged(a, b)) == opinion(merged(b, a))
    assert opinion(merged(merged(a, b), c)) == opinion(merged(a, merged(b, c)))
    assert opinion(merged(a, a)) == opinion(a)
    assert opinion(merged(a, Roster(NETWORK))) == opinion(a)


@settings(max_examples=100)
@given(histories, st.randoms())
def test_the_order_in_which_records_come_does_not_matter(
    history: list[Record], shuffler: random.Random
) -> None:
    """One by one, in any order, with what had to wait given again."""
    together, alone = roster(*history), Roster(NETWORK)
    shuffler.shuffle(history)
    for _ in range(len(history) + 1):
        for record in history:
            alone.admit([record])
    assert opinion(alone) == opinion(together)


@settings(max_examples=100)
@given(histories, histories, st.integers(1, 7))
def test_a_revoked_box_never_returns(before: list[Record], after: list[Record], out: int) -> None:
    """Whatever is said before or after, by whomever but the founder."""
    revoked = IDENTITIES[out]
    known = roster(certificate(FOUNDER, revoked), *before)
    known.admit([revocation(FOUNDER, revoked, epoch=2)])
    assert not known.member(revoked.node_id).ok
    for record in after:
        known.admit([record])
        assert not known.member(revoked.node_id).ok
    # The same records the other way round.
    other = roster(*after, *before, revocation(FOUNDER, revoked, epoch=2))
    other.admit([certificate(FOUNDER, revoked)])
    assert not other.member(revoked.node_id).ok


@settings(max_examples=60)
@given(histories, histories, st.data())
def test_revocations_only_remove_members(
    history: list[Record], more: list[Record], data: st.DataObject
) -> None:
    """Revocations only ever take members away, also those of somebody who is revoked later."""
    known = roster(*history)
    before = set(known.members())
    known.admit([one for one in more if one.kind == "revocation"])
    assert set(known.members()) <= before


def test_admins_invite_and_whom_they_invite_may_and_those_may_not() -> None:
    admin, plain, guest, stranger = IDENTITIES[1:5]
    known = roster(
        certificate(FOUNDER, admin, admin=True, name="admin"),
        certificate(admin, plain, name="plain"),
        certificate(plain, guest, name="guest"),
        certificate(guest, stranger),
        certificate(plain, IDENTITIES[5], admin=True),
    )
    assert known.member(admin.node_id) == (
        True,
        f"{FOUNDER.node_id[:13]} invited it",
        "admin",
        True,
    )
    assert known.member(plain.node_id).ok and not known.member(plain.node_id).admin
    assert known.member(guest.node_id).why == "plain invited it"
    assert known.member(stranger.node_id) == (False, "no member has certified it", "", False)
    assert not known.member(IDENTITIES[5].node_id).ok  # only an admin makes admins
    with pytest.raises(ValueError, match="may not invite"):
        known.certify(guest, stranger.node_id, "stranger", NOW)
    with pytest.raises(ValueError, match="only an admin"):
        known.certify(plain, stranger.node_id, "stranger", NOW, admin=True)


def test_the_right_to_revoke() -> None:
    admin, plain, guest, other = IDENTITIES[1:5]
    known = roster(
        certificate(FOUNDER, admin, admin=True),
        certificate(FOUNDER, plain),
        certificate(plain, guest),
        certificate(FOUNDER, other),
    )
    with pytest.raises(ValueError, match="whoever invited"):
        known.revoke(other, guest.node_id, NOW)
    with pytest.raises(ValueError, match="founder"):
        known.revoke(admin, FOUNDER.node_id, NOW)
    known.admit([revocation(other, guest), revocation(guest, plain), revocation(admin, FOUNDER)])
    assert set(known.members()) == {one.node_id for one in (FOUNDER, admin, plain, guest, other)}
    known.revoke(plain, guest.node_id, NOW, "sold")
    assert "revoked it (sold)" in known.member(guest.node_id).why
    known.revoke(admin, other.node_id, NOW)
    assert not known.member(other.node_id).ok


def test_members_invited_by_a_revoked_box_fall_unless_certified_again() -> None:
    plain, guest, second = IDENTITIES[1:4]
    known = roster(
        certificate(FOUNDER, plain), certificate(plain, guest, name="g"), certificate(plain, second)
    )
    assert known.orphans(plain.node_id) == {guest.node_id: "g", second.node_id: "box"}
    known.certify(FOUNDER, guest.node_id, "g", NOW)
    known.revoke(FOUNDER, plain.node_id, NOW)
    assert known.member(guest.node_id).ok
    assert "is not a member any more" in known.member(second.node_id).why


def test_only_the_founder_readmits() -> None:
    admin, lost = IDENTITIES[1:3]
    known = roster(certificate(FOUNDER, admin, admin=True), certificate(admin, lost))
    known.revoke(admin, lost.node_id, NOW)
    with pytest.raises(ValueError, match="only the network's founder"):
        known.certify(admin, lost.node_id, "again", NOW)
    known.admit([certificate(admin, lost, epoch=5)])
    assert not known.member(lost.node_id).ok
    known.certify(FOUNDER, lost.node_id, "again", NOW)
    assert known.member(lost.node_id).ok
    known.admit([revocation(admin, lost, epoch=9)])
    assert known.member(lost.node_id).ok
    known.revoke(FOUNDER, lost.node_id, NOW)
    assert not known.member(lost.node_id).ok
    known.certify(FOUNDER, lost.node_id, "third", NOW)
    assert known.member(lost.node_id).name == "third"


@settings(max_examples=60)
@given(certificates, st.integers(0, 10**6), st.integers(1, 255))
def test_a_changed_byte_is_a_forgery(record: Record, at: int, flip: int) -> None:
    whole = bytearray(record.body + record.signature)
    whole[at % len(whole)] ^= flip
    body, signature = bytes(whole[:-64]), bytes(whole[-64:])
    known = Roster(NETWORK)
    done = known.admit([Record(record.kind, body, signature)])
    assert done.forged and not known.records()


def test_forged_and_foreign_records_differ_from_early_ones() -> None:
    plain, stranger = IDENTITIES[1:3]
    forged = certificate(FOUNDER, plain, signed_by=stranger)
    foreign = certificate(FOUNDER, plain, network=OTHER_NETWORK)
    good = certificate(FOUNDER, plain)
    crossed = Record("revocation", good.body, good.signature)
    early = certificate(plain, stranger)
    done = Roster(NETWORK).admit([forged, foreign, crossed, early])
    assert done.forged[:2] == [
        "a member with a wrong signature",
        "a record of another network",
    ]
    assert len(done.forged) == 3 and not done.refused and not done.new  # `early` waits


def test_one_member_cannot_fill_the_roster_and_loses_no_revocation_by_trying() -> None:
    plain, guest = IDENTITIES[1:3]
    known = roster(certificate(FOUNDER, plain), certificate(plain, guest), revocation(plain, guest))
    flood = [certificate(plain, known_identity(100 + n), serial=n) for n in range(2 * MAX_INVITED)]
    flood += [revocation(plain, known_identity(100 + n)) for n in range(2 * MAX_INVITED)]
    done = known.admit(flood)
    assert len(done.new) == 2 * (MAX_INVITED - 1)
    assert set(done.refused) == {"its signer has signed as much as it may"}
    assert not known.member(guest.node_id).ok


def test_a_member_that_fills_the_roster_can_be_revoked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rosters, "MAX_RECORDS", 20)
    admin = IDENTITIES[1]
    known = roster(certificate(FOUNDER, admin, admin=True))
    flood = [certificate(admin, known_identity(100 + n), admin=True) for n in range(40)]
    assert len(known.admit(flood).new) == 19
    known.revoke(FOUNDER, admin.node_id, NOW)
    assert list(known.members()) == [FOUNDER.node_id]


def test_a_wrong_clock_is_shown_and_decides_nothing() -> None:
    late = roster(certificate(FOUNDER, IDENTITIES[1], at=NOW + 86400))
    verdict = late.member(IDENTITIES[1].node_id, NOW)
    assert verdict.ok and "86400 s from now: a clock is wrong" in verdict.why
    early = roster(certificate(FOUNDER, IDENTITIES[1], at=NOW - 86400))
    assert early.member(IDENTITIES[1].node_id, NOW).ok


def test_a_name_is_the_admins_and_cannot_hide_what_it_does() -> None:
    plain, named = IDENTITIES[1:3]
    known = roster(
        certificate(FOUNDER, plain),
        certificate(FOUNDER, named, name="den", serial=1),
        certificate(plain, named, name="nonsense", serial=9),
    )
    assert known.member(named.node_id).name == "den"
    with pytest.raises(ValueError):
        known.certify(FOUNDER, IDENTITIES[3].node_id, "a\x1b[2Jb", NOW)


@settings(max_examples=60)
@given(histories)
def test_every_member_can_show_that_it_is_one(history: list[Record]) -> None:
    known = roster(*history)
    for node in known.members():
        shown = roster(*known.proof(node))
        assert shown.member(node).ok


def test_rosters_find_where_they_differ() -> None:
    records = [certificate(FOUNDER, known_identity(n)) for n in range(100)]
    whole, part = roster(*records), roster(*records[1:])
    differ = [
        n for n, (a, b) in enumerate(zip(whole.buckets(), part.buckets(), strict=True)) if a != b
    ]
    assert whole.digest() != part.digest() and len(differ) == 1
    missing = set(whole.in_bucket(differ[0])) - set(part.in_bucket(differ[0]))
    assert missing == {record_id(records[0])}
