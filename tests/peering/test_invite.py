"""Tickets: what goes in comes out; everything else is refused in a sentence."""

from __future__ import annotations

import asyncio
import base64
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pinaivu_box.membership import tickets
from pinaivu_box.membership.tickets import Ticket, TicketInvalid, TicketRefused
from pinaivu_box.store import peers as store
from pinaivu_box.store.database import Database
from pinaivu_box.store.peers import Invitation
from tests.support.keys import FOUNDER, IDENTITIES, NETWORK
from tests.support.records import NOW


def made(
    uses: int = 1, addresses: tuple[str, ...] = ("192.168.1.5:4002",)
) -> tuple[str, Invitation]:
    return tickets.invite(
        FOUNDER.node_id, NETWORK, addresses, now=NOW, seconds=3600, uses=uses, name="den"
    )


def test_a_ticket_has_the_inviters_key_and_addresses_and_its_secret_is_not_kept() -> None:
    text, invitation = made()
    ticket = tickets.decode(text)
    assert ticket.node_id == FOUNDER.node_id
    assert ticket.addresses == ("192.168.1.5:4002",)
    assert ticket.expires_at == NOW + 3600
    assert invitation.secret_sha256 == tickets.secret_hash(ticket.secret)
    assert ticket.secret.hex() not in repr(invitation) and len(ticket.secret) == 16
    assert made()[0] != text  # another secret


def test_how_it_is_written_down_does_not_matter() -> None:
    text, _ = made()
    broken = "  " + text[:20].upper() + "\n" + text[20:] + "\r\n"
    assert tickets.decode(broken) == tickets.decode(text)


@given(
    st.builds(
        Ticket,
        st.binary(min_size=32, max_size=32),
        st.binary(min_size=36, max_size=36),
        st.binary(min_size=16, max_size=16),
        st.integers(0, 2**53 - 1),
        st.lists(st.from_regex(r"[!-~]{1,60}", fullmatch=True), max_size=8).map(tuple),
    )
)
def test_encode_and_decode_agree(ticket: Ticket) -> None:
    assert tickets.decode(tickets.encode(ticket)) == ticket


@given(st.data())
def test_a_changed_letter_is_noticed(data: st.DataObject) -> None:
    text, _ = made()
    at = data.draw(st.integers(4, len(text) - 2))  # the last letter has bits that say nothing
    other = data.draw(st.sampled_from("abcdefghijklmnopqrstuvwxyz234567"))
    changed = text[:at] + other + text[at + 1 :]
    if changed != text:
        with pytest.raises(TicketInvalid):
            tickets.decode(changed)


@given(st.one_of(st.text(), st.text(alphabet="abcdefghij234567=").map("pnv1".__add__)))
def test_any_other_text_is_refused_in_a_sentence(text: str) -> None:
    with pytest.raises(TicketInvalid) as refused:
        tickets.decode(text)
    assert str(refused.value).endswith(".")


@given(st.binary(max_size=200))
def test_content_with_a_right_checksum_that_makes_no_sense(body: bytes) -> None:
    text = tickets.PREFIX + base64.b32encode(tickets._checksum(body) + body).decode()
    with pytest.raises(TicketInvalid):
        tickets.decode(text)


def test_content_out_of_bounds() -> None:
    ticket = tickets.decode(made()[0])
    far = Ticket(ticket.inviter, ticket.network, ticket.secret, 1, ("a:1",) * 9)
    hidden = Ticket(ticket.inviter, ticket.network, ticket.secret, 1, ("a\x1b[2J:1",))
    short = Ticket(ticket.inviter, ticket.network, b"short", 1, ())
    for bad in (far, hidden, short):
        with pytest.raises(TicketInvalid):
            tickets.decode(tickets.encode(bad))
    with pytest.raises(TicketInvalid, match="too long"):
        tickets.decode("pnv1" + "a" * 10**6)
    with pytest.raises(TicketInvalid, match="version"):
        tickets.decode("pnv2abc")


def test_a_ticket_for_one_serves_one() -> None:
    text, invitation = made()
    secret = tickets.decode(text).secret
    after = tickets.redeem(invitation, secret, IDENTITIES[1].node_id, NOW)
    with pytest.raises(TicketRefused, match="used already"):
        tickets.redeem(after, secret, IDENTITIES[2].node_id, NOW)
    # Whoever lost our answer may ask again, also after the hour.
    assert tickets.redeem(after, secret, IDENTITIES[1].node_id, NOW + 9999) == after


@given(st.lists(st.integers(0, 7), max_size=30), st.integers(1, 5))
def test_a_ticket_is_never_used_more_often_than_allowed(who: list[int], uses: int) -> None:
    text, invitation = made(uses)
    secret, let_in = tickets.decode(text).secret, set()
    for number in who:
        try:
            invitation = tickets.redeem(invitation, secret, IDENTITIES[number].node_id, NOW)
            let_in.add(number)
        except TicketRefused:
            assert len(let_in) == uses and number not in let_in
    assert len(let_in) == min(uses, len(set(who)))


def test_expired_withdrawn_and_guessed_tickets() -> None:
    text, invitation = made()
    secret, who = tickets.decode(text).secret, IDENTITIES[1].node_id
    with pytest.raises(TicketRefused, match="expired"):
        tickets.redeem(invitation, secret, who, NOW + 3600)
    ahead = invitation._replace(made_at=round(NOW + 86400) * 1000)  # for an hour, as its clock said
    with pytest.raises(TicketRefused, match="from the future"):
        tickets.redeem(ahead, secret, who, NOW)
    with pytest.raises(TicketRefused, match="no such ticket"):
        tickets.redeem(None, secret, who, NOW)
    with pytest.raises(TicketRefused, match="no such ticket"):
        tickets.redeem(invitation, b"0" * 16, who, NOW)


@pytest.mark.parametrize("wrong", [{"uses": 0}, {"uses": 1001}, {"seconds": 0}, {"seconds": -1}])
def test_an_invitation_that_makes_no_sense(wrong: dict[str, int]) -> None:
    values: dict[str, float] = {"now": NOW, "seconds": 60, **wrong}
    with pytest.raises(ValueError):
        tickets.invite(FOUNDER.node_id, NETWORK, [], **values)  # type: ignore[arg-type]


def test_the_newest_ticket_follows_from_its_order_and_no_clock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A founder whose clock was ahead when it put somebody out can still let it in again."""

    async def run() -> None:
        async with Database(tmp_path / "box.db") as database:
            found = []
            for number, days in enumerate((0, 400, 0)):
                now = round((NOW + days * 86400) * 1000)
                monkeypatch.setattr(store, "now_ms", lambda now=now: now)
                await store.add_ticket(database, Invitation(f"{number}", None, 9, 1, False))
                if days:
                    await store.add_records(database, [(b"1", "revocation", b"", b"")])
                    await store.add_records(database, [(b"1", "revocation", b"", b"")])
            for number in range(3):
                ticket = await store.ticket(database, f"{number}")
                assert ticket is not None
                found.append((ticket.newest, ticket.made_at))
            ahead = round((NOW + 400 * 86400) * 1000)
            now = round(NOW * 1000)
            assert found == [(False, now), (False, ahead), (True, now)]

    asyncio.run(run())
