"""The ledger's tables: what is taken, what is refused, and that the sums are those of the rows."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pinaivu_box.errors import EntryRefused
from pinaivu_box.ledger import entry as ledger_entry
from pinaivu_box.ledger.entry import Balance, LedgerEntry
from pinaivu_box.receipts.receipt import ACCEPTANCE_DOMAIN, Price
from pinaivu_box.store.database import Database
from tests.support.keys import IDENTITIES
from tests.support.ledger_entries import entry

pytestmark = pytest.mark.anyio
US, PEER, OTHER = IDENTITIES[:3]
OUTPUT, PROMPT = 20_000_000, 8_000_000  # what the entry of `books` comes to


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Database]:
    async with Database(tmp_path / "box.db") as opened:
        yield opened


async def with_peer(database: Database) -> Balance:
    return (await ledger_entry.balance(database, PEER.node_id)).get("credits", Balance())


async def record(database: Database, one: LedgerEntry) -> None:
    await ledger_entry.record(database, one, US.node_id)


async def test_an_entry_that_is_recorded_twice_counts_once(database: Database) -> None:
    served, received = entry(US, PEER), entry(US, PEER, served_by_us=False)
    for _ in range(2):
        await record(database, served)
        await record(database, received)
    both = OUTPUT + PROMPT
    assert await with_peer(database) == Balance(both, both, both, both)
    await record(database, entry(US, PEER, "req_2", price=Price("euro", "1", "1", "1")))
    assert (await ledger_entry.balance(database, PEER.node_id))["euro"].net == 30_000_000
    assert (await ledger_entry.balance(database, OTHER.node_id)) == {}


async def test_an_entry_counts_once_it_is_accepted(database: Database) -> None:
    served = entry(US, PEER)
    await record(database, msgspec.structs.replace(served, acceptance=b""))
    waiting = await with_peer(database)
    assert (waiting.net, waiting.credit_used) == (0, OUTPUT + PROMPT)
    await record(database, served)
    accepted = await with_peer(database)
    assert (accepted.net, accepted.waiting) == (OUTPUT + PROMPT, 0)
    await record(database, msgspec.structs.replace(served, acceptance=b""))  # an old one
    assert await with_peer(database) == accepted


async def test_work_for_a_peer_and_by_it_is_netted(database: Database) -> None:
    await record(database, entry(US, PEER, "req_1"))
    for number in range(3):
        await record(database, entry(US, PEER, f"req_{number}", served_by_us=False))
    found = await with_peer(database)
    assert (found.net, found.owed_to_peer) == (-2 * (OUTPUT + PROMPT), 2 * (OUTPUT + PROMPT))
    assert found.credit_used == 0


async def test_choices_pay_for_their_prompt_once(database: Database) -> None:
    await record(database, entry(US, PEER))
    second = entry(US, PEER, leg=1, choice=1, prompt_paid=False)
    await record(database, second)
    assert (await with_peer(database)).served == 2 * OUTPUT + PROMPT
    with pytest.raises(EntryRefused, match="paid for already"):
        await record(database, entry(US, PEER, leg=2, choice=2))
    await record(database, entry(US, PEER, leg=2, choice=2, prompt=1))  # another prompt
    assert (await with_peer(database)).served == 3 * OUTPUT + 2 * PROMPT


REFUSED: dict[str, dict[str, Any]] = {
    "an altered amount": {"amount": OUTPUT + PROMPT + 1},
    "a forged signature": {"signature": OTHER.sign("pinaivu/proof/v1", entry(US, PEER).proof)},
    "an acceptance by another": {
        "acceptance": OTHER.sign(ACCEPTANCE_DOMAIN, entry(US, PEER).proof)
    },
    "a signature for something else": {
        "acceptance": PEER.sign("pinaivu/proof/v1", entry(US, PEER).proof)
    },
    "another's request": {"request_id": "req_2"},
    "another leg": {"leg": 1},
    "another choice": {"choice": 1},
    "another currency": {"currency": "euro"},
    "an entry of another peer": {"peer": OTHER.node_id},
    "ours as theirs": {"served_by_us": False},
    "an altered proof": {"proof": entry(US, PEER).proof.replace(b'"leg":0', b'"leg":00')},
    "no proof": {"proof": b"\xff"},
    "a large proof": {"proof": b" " * 300_000 + entry(US, PEER).proof},
}


@pytest.mark.parametrize("change", REFUSED.values(), ids=REFUSED)
async def test_an_entry_that_is_not_proven_is_refused(
    database: Database, change: dict[str, Any]
) -> None:
    with pytest.raises(EntryRefused):
        await record(database, msgspec.structs.replace(entry(US, PEER), **change))
    assert await ledger_entry.balances(database) == {}


@pytest.mark.parametrize(
    "more",
    [
        {"cached_tokens": 21},
        {"completion_tokens": -1, "prompt_tokens": 100},
        {"price": Price("credits", "-1", "0", "1")},
        {"completion_tokens": 2**52, "price": Price("credits", "1", "1", "1000000")},
        {"leg": -1},
        {"prompt": 2**40},
    ],
)
async def test_a_proof_of_what_cannot_be_is_refused(
    database: Database, more: dict[str, Any]
) -> None:
    with pytest.raises(EntryRefused):
        await record(database, entry(US, PEER, **more))
    assert await ledger_entry.balances(database) == {}


async def test_another_proof_of_the_same_leg_is_refused(database: Database) -> None:
    await record(database, entry(US, PEER))
    for again in (entry(US, PEER, completion_tokens=11), entry(US, PEER, prompt_paid=False)):
        with pytest.raises(EntryRefused, match="req_1, leg 0"):
            await record(database, again)
    assert (await with_peer(database)).served == OUTPUT + PROMPT


async def test_one_that_is_refused_takes_no_other_with_it(database: Database) -> None:
    await record(database, entry(US, PEER))
    many = [entry(US, PEER, f"req_{number}", completion_tokens=11) for number in range(1, 40)]
    done = await asyncio.gather(*(record(database, one) for one in many), return_exceptions=True)
    assert [type(one) for one in done if one] == [EntryRefused]
    assert (await with_peer(database)).served == OUTPUT + PROMPT + 38 * (22_000_000 + PROMPT)


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE ledger_entries SET amount = 0",
        "UPDATE ledger_entries SET acceptance = x'00'",
        "DELETE FROM ledger_entries",
        "INSERT OR REPLACE INTO ledger_entries SELECT * FROM ledger_entries",
        "UPDATE ledger_entries SET statement = 'stmt_1'",  # there is none
    ],
)
async def test_a_stored_entry_cannot_be_changed(
    database: Database, tmp_path: Path, statement: str
) -> None:
    await record(database, entry(US, PEER))
    with pytest.raises(sqlite3.IntegrityError):
        await database.write((statement, ()))
    assert (await with_peer(database)).open_served == OUTPUT + PROMPT
