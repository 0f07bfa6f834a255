"""Adverts: the newest counts, for as long as it says, whatever the clocks."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from pinaivu_box.gossip import adverts
from pinaivu_box.gossip.adverts import Advert, Adverts
from pinaivu_box.membership.records import Invalid, Record, seal
from tests.support.gossip_net import fresh_adverts
from tests.support.keys import IDENTITIES
from tests.support.records import NOW, advert, gone, offer

A, B, C = IDENTITIES[1:4]


def hear(book: Adverts, made: tuple[Advert, Record], now: float, age: float = 0.0) -> str | None:
    return book.accept(*made, age, now, members=3)


def fresh(book: Adverts, now: float) -> list[int]:
    return [held.advert.serial for held in fresh_adverts(book, now)]


def test_the_newest_counts_until_it_has_lived() -> None:
    book = Adverts()
    assert hear(book, advert(A, 5), 100.0) is None
    assert hear(book, advert(A, 5), 101.0) == "older than the newest one"
    assert hear(book, advert(A, 4), 101.0) == "older than the newest one"
    assert hear(book, advert(A, 6), 102.0) is None
    assert fresh(book, 116.9) == [6] and fresh(book, 117.0) == []


def test_an_old_one_is_not_played_again_after_the_new_one_expired() -> None:
    book = Adverts()
    hear(book, advert(A, 6), 0.0)
    book.forget(100.0, {A.node_id: 1})
    assert hear(book, advert(A, 5), 100.0) == "older than the newest one"
    assert hear(book, advert(A, 6), 100.0) == "older than the newest one"


def test_age_counts_on_the_way() -> None:
    book = Adverts()
    assert hear(book, advert(A, 1), 100.0, age=10.0) is None
    assert fresh(book, 104.9) == [1] and fresh(book, 105.0) == []
    assert hear(book, advert(B, 1), 100.0, age=15.0) == "expired"


@given(st.floats(-100_000, 100_000))
def test_a_clock_that_is_off_changes_nothing(off: float) -> None:
    book = Adverts()
    assert hear(book, advert(A, 1, at=NOW + off), 100.0) is None
    assert fresh(book, 114.9) == [1] and fresh(book, 115.0) == []


@settings(max_examples=60)
@given(st.integers(0, 10**6), st.integers(1, 255))
def test_a_changed_byte_is_a_forgery(at: int, flip: int) -> None:
    _, record = advert(A, 1)
    whole = bytearray(record.body + record.signature)
    whole[at % len(whole)] ^= flip
    with pytest.raises(Invalid):
        adverts.read(Record("advert", bytes(whole[:-64]), bytes(whole[-64:])))


def test_anothers_signature_and_another_kind_are_forgeries() -> None:
    for record in (
        advert(A, 1, signed_by=B)[1],
        Record("gone", advert(A, 1)[1].body, advert(A, 1)[1].signature),
        Record("member", advert(A, 1)[1].body, advert(A, 1)[1].signature),
    ):
        with pytest.raises(Invalid):
            adverts.read(record)
    assert adverts.read(advert(A, 1)[1]) == advert(A, 1)[0]


@pytest.mark.parametrize(
    "change",
    [
        {"models": (offer(),) * 65},
        {"models": (offer(queue=-1),)},
        {"models": (offer(ttft_ms=2**40),)},
        {"models": (offer("x" * 129),)},
        {"models": (offer(digest=b"short"),)},
        {"models": (offer(prices=("-1", "0", "0")),)},
        {"models": (offer(prices=("NaN", "0", "0")),)},
        {"models": (offer(prices=("1", "0", "1E-9")),)},
        {"models": (offer(ttft_ms=float("nan")),)},
        {"addresses": ("a:1",) * 9},
        {"addresses": ("a b",)},
        {"life": 601},
        {"life": 0},
        {"serial": -1},
        {"serial": 2**53},
        {"version": "v" * 33},
    ],
)
def test_adverts_out_of_bounds_are_refused(change: dict[str, object]) -> None:
    made = replace(advert(A, 1)[0], **change)
    with pytest.raises(Invalid):
        adverts.read(seal(A, "advert", made))


def test_the_largest_is_small_enough_to_pass_on() -> None:
    with pytest.raises(ValueError, match="8192"):
        advert(A, 1, models=tuple(offer(f"{n:0128}") for n in range(64)))


def test_one_member_cannot_flood_and_does_not_silence_others() -> None:
    book = Adverts()
    heard = [hear(book, advert(A, serial), 100.0) for serial in range(1, 101)]
    assert heard.count(None) == 6
    assert heard[-1] == "more adverts than a member may send"
    assert hear(book, advert(B, 1), 100.0) is None
    assert hear(book, advert(A, 101), 101.0) is None


def test_a_box_that_left_the_network_is_forgotten() -> None:
    book = Adverts()
    hear(book, advert(A, 1), 0.0)
    hear(book, advert(B, 1), 0.0)
    number = book.get(A.node_id).id  # type: ignore[union-attr]
    assert book.forget(1.0, {B.node_id: 1}) == [number]
    assert book.get(A.node_id) is None and book.find(number) is None
    assert len(book.ids()) == 1


def test_a_report_holds_until_the_next_advert() -> None:
    book = Adverts()
    hear(book, advert(A, 1), 0.0)
    assert book.report(*gone(B, A, 2), 0.0) == "not about its last advert"
    assert book.report(*gone(B, A, 1), 0.0) is None and book.gone(A.node_id)
    assert book.report(*gone(C, A, 1), 0.0) == "known"
    hear(book, advert(A, 2), 1.0)
    assert not book.gone(A.node_id) and len(book.ids()) == 1
    assert book.report(*gone(B, A, 1), 2.0) == "not about its last advert"


def test_one_member_cannot_call_everybody_gone() -> None:
    book = Adverts()
    crowd = [IDENTITIES[0], *IDENTITIES[2:]]
    said = 0
    for serial in range(1, 6):
        for one in crowd:
            assert hear(book, advert(one, serial), float(serial)) is None
            said += book.report(*gone(A, one, serial), float(serial)) is None
    assert 24 <= said <= 26 < 5 * len(crowd)


def test_the_rate_of_received_adverts_does_not_grow_with_the_network() -> None:
    assert adverts.period(2) == adverts.period(125) == 5.0
    assert adverts.period(1000) == 40.0
    assert adverts.PERIODS_PER_LIFE * adverts.period(10**6) <= adverts.MAX_LIFE_SECONDS
