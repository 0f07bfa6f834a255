"""Which addresses of a box are told, and which are remembered."""

from __future__ import annotations

import pytest

from pinaivu_box.membership.tickets import MAX_ADDRESSES, decode
from pinaivu_box.transport.link import LinkView
from tests.support.memory_transport import MemoryConnection, MemoryTransport
from tests.support.network_sites import SiteGroup, states
from tests.support.waiting import wait_until

pytestmark = pytest.mark.anyio
RELAY = "https://relay.example/"


async def test_the_relay_is_advertised_however_many_addresses_there_are(
    group: SiteGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = [f"10.0.0.{number}:4002" for number in range(MAX_ADDRESSES + 3)]
    monkeypatch.setattr(MemoryTransport, "addresses", lambda _: [*many, RELAY])
    box = await group.box("one")
    told = [*many[: MAX_ADDRESSES - 1], RELAY]
    assert box.own_addresses() == told
    assert list(decode(await box.invite()).addresses) == told


async def test_the_addresses_of_a_lost_box_are_kept_after_a_short_link_by_a_relay(
    group: SiteGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its advert is forgotten soon, and then it could not be called any more."""
    monkeypatch.setattr(MemoryConnection, "route", lambda _: LinkView(False, RELAY, 80.0))
    one, two = await group.joined("one", "two")
    said = two.own_addresses()
    await group.sites[1].kill()
    await wait_until(lambda: states(one)["two"] != "connected")
    book = one._membership
    await wait_until(lambda: two.node_id in book.known)
    await wait_until(lambda: set(said) <= set(book.known[two.node_id].addresses))
    await group.sites[0].kill()
    one = await group.sites[0].open()
    assert set(one.peer("two").addresses) == {*said, RELAY}
