"""Two boxes settle: they agree to the last digit or name what differs, whatever is lost on the way,
and a peer that lies gets nothing signed."""

from __future__ import annotations

import asyncio
import itertools
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pinaivu_box.errors import BoxError, LinkLost, PeeringError
from pinaivu_box.identity import Identity, verify
from pinaivu_box.ledger import claims, reconcile
from pinaivu_box.ledger import entry as ledger_entry
from pinaivu_box.ledger import statement as ledger_statement
from pinaivu_box.ledger import wire as w
from pinaivu_box.ledger.entry import LedgerEntry
from pinaivu_box.ledger.reconcile import Comparison, EntrySummary, EntryTree
from pinaivu_box.ledger.session import (
    EntrySnapshot,
    Ledger,
    ReconcileSession,
    SettlementOutcome,
)
from pinaivu_box.receipts.receipt import (
    ACCEPTANCE_DOMAIN,
    Proof,
    Receipt,
    TokenUsage,
    canonical,
    sign_proof,
    sign_receipt,
)
from pinaivu_box.store import audit
from pinaivu_box.store.audit import Actor
from pinaivu_box.store.database import Database
from pinaivu_box.transport import wire
from pinaivu_box.transport.link import Link, Stream
from tests.support.keys import IDENTITIES
from tests.support.ledger_entries import entry
from tests.support.memory_transport import MemoryNetwork, MemoryTransport
from tests.support.waiting import soon

pytestmark = pytest.mark.anyio
A, B, C = IDENTITIES[:3]


@dataclass
class Pair:
    """Two homes and a link between them."""

    a: Database
    b: Database
    link: Link
    back: Link

    async def both(self, *served_by_a: LedgerEntry) -> None:
        """Entries as A writes them, written by both."""
        for one in served_by_a:
            await ledger_entry.record(self.a, one, A.node_id)
            await ledger_entry.record(self.b, mirrored(one), B.node_id)

    async def settle(self, *, by: Identity = A, wrap: Any = None) -> SettlementOutcome:
        """`wrap` makes another stream of the asker's."""
        mine, its = (self.a, self.b) if by is A else (self.b, self.a)
        link, other = (self.link, self.back) if by is A else (self.back, self.link)
        peer = B if by is A else A

        async def answer() -> None:
            await Ledger(peer, its).handle(by.node_id, await other.accept())

        answering = asyncio.create_task(answer())
        try:
            stream = await soon(link.open())
            settling = Ledger(by, mine).settle(peer.node_id, wrap(stream) if wrap else stream)
            outcome: SettlementOutcome = await soon(settling)
            return outcome
        finally:
            await soon(asyncio.wait([answering]))
            answering.result()

    async def sums(self) -> tuple[int, int]:
        """What B owes A: as A says, and as B says."""
        a = await ledger_entry.balance(self.a, B.node_id)
        b = await ledger_entry.balance(self.b, A.node_id)
        return sum(one.net for one in a.values()), -sum(one.net for one in b.values())

    async def signed(self) -> tuple[list[bytes], list[bytes]]:
        a, b = await ledger_statement.ls(self.a), await ledger_statement.ls(self.b)
        return [one.signed for one in a], [one.signed for one in b]


def mirrored(one: LedgerEntry) -> LedgerEntry:
    """The same entry, as the other of the two writes it."""
    return msgspec.structs.replace(
        one, peer=A.node_id, served_by_us=not one.served_by_us, at=one.at + 5
    )


@asynccontextmanager
async def pair_in(folder: Path) -> AsyncIterator[Pair]:
    network = MemoryNetwork()
    ours, theirs = (MemoryTransport(network, who.node_id) for who in (A, B))
    async with AsyncExitStack() as stack:
        a, b = [
            await stack.enter_async_context(Database(folder / f"{name}.db")) for name in ("a", "b")
        ]
        link, back = await asyncio.gather(
            ours.connect(B.node_id, theirs.addresses(), 10), theirs.accept()
        )
        yield Pair(a, b, link, back)
        await ours.close()
        await theirs.close()


@pytest.fixture
async def pair(tmp_path: Path) -> AsyncIterator[Pair]:
    async with pair_in(tmp_path) as made:
        yield made


def some(count: int, start: int = 0, **more: Any) -> list[LedgerEntry]:
    """Of A's, every third served by B."""
    return [
        entry(A, B, f"req_{n:04}", served_by_us=n % 3 > 0, completion_tokens=n + 1, **more)
        for n in range(start, start + count)
    ]


# -- agreeing --------------------------------------------------------------------------------------


async def test_equal_books_are_signed_by_both(pair: Pair) -> None:
    await pair.both(*some(30))
    owed = await pair.sums()
    outcome = await pair.settle()
    (made,) = outcome.statements
    assert (outcome.differences, outcome.taken, outcome.given) == ([], 0, 0)
    (there,) = await ledger_statement.ls(pair.b)
    assert there.signed == made.signed and (there.ours, there.theirs) == (made.theirs, made.ours)
    assert verify(A.node_id, ledger_statement.DOMAIN, made.signed, made.ours)
    assert verify(B.node_id, ledger_statement.DOMAIN, made.signed, made.theirs)
    assert ledger_statement.read(made.signed).entries == 30
    assert await pair.sums() == owed  # it is signed, not paid
    assert (await pair.settle()).statements == []  # nothing is left
    for database, peer in ((pair.a, B), (pair.b, A)):
        found = (await ledger_entry.balance(database, peer.node_id))["credits"]
        assert (found.open_served, found.open_received) == (0, 0)


async def test_statements_follow_each_other_whoever_asks(pair: Pair) -> None:
    for number, by in enumerate((A, B, B, A)):
        await pair.both(*some(5, start=5 * number))
        assert len((await pair.settle(by=by)).statements) == 1
    ours, theirs = await pair.signed()
    assert ours == theirs and len(ours) == 4
    read = [ledger_statement.read(one) for one in reversed(ours)]
    assert [one.sequence for one in read] == [1, 2, 3, 4]
    for before, after in itertools.pairwise(reversed(ours)):
        assert ledger_statement.read(after).previous == sha256(before).hexdigest()


async def test_many_entries_are_signed_in_several_statements(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pinaivu_box.ledger.session.MAX_STATEMENT_ENTRIES", 40)
    await pair.both(*some(100))
    assert [
        ledger_statement.read(one.signed).entries for one in (await pair.settle()).statements
    ] == [
        40,
        40,
        20,
    ]
    ours, theirs = await pair.signed()
    assert sorted(ours) == sorted(theirs) and len(ours) == 3


async def test_an_entry_that_one_side_lost_comes_back(pair: Pair) -> None:
    """An entry here, one there, and an acceptance that never came."""
    await pair.both(*some(20))
    here, there, waiting = some(3, start=20)
    await ledger_entry.record(pair.a, here, A.node_id)
    await ledger_entry.record(pair.b, mirrored(there), B.node_id)
    late = entry(A, B, "req_late", served_by_us=False)
    await ledger_entry.record(pair.a, late, A.node_id)
    await ledger_entry.record(
        pair.b, msgspec.structs.replace(mirrored(late), acceptance=b""), B.node_id
    )
    await ledger_entry.record(
        pair.a, msgspec.structs.replace(waiting, acceptance=b""), A.node_id
    )  # B has none
    outcome = await pair.settle()
    assert (outcome.taken, outcome.given, outcome.differences) == (1, 1, [])
    assert outcome.accepted == 1
    assert [one.request_id for one in outcome.disputed] == [waiting.request_id]
    assert ledger_statement.read(outcome.statements[0].signed).entries == 23
    ours, theirs = await pair.sums()
    assert ours == theirs
    left = (await ledger_entry.balance(pair.a, B.node_id))["credits"]
    assert left.waiting == waiting.amount  # nobody has accepted it


async def test_more_than_a_frame_is_given(pair: Pair) -> None:
    for one in some(700):
        await ledger_entry.record(pair.a, one, A.node_id)
    outcome = await pair.settle()
    assert outcome.given == 700 and len(outcome.statements) == 1
    assert (await pair.signed())[0] == (await pair.signed())[1]


# -- differing -------------------------------------------------------------------------------------


async def test_the_request_that_differs_is_named_with_both_values(pair: Pair) -> None:
    await pair.both(*some(300))
    await ledger_entry.record(pair.a, entry(A, B, "req_x", completion_tokens=10), A.node_id)
    await ledger_entry.record(
        pair.b, mirrored(entry(A, B, "req_x", completion_tokens=10, prompt_paid=False)), B.node_id
    )
    for by, values in ((A, ("0.028", "0.02")), (B, ("0.02", "0.028"))):
        outcome = await pair.settle(by=by)
        (told,) = outcome.differences
        assert (told.request_id, told.served_by) == ("req_x", A.node_id)
        assert (told.ours, told.theirs) == tuple(f"{one} credits" for one in values)
        assert outcome.statements == []
    assert await pair.signed() == ([], [])


@given(st.data())
@settings(max_examples=60)
def test_every_difference_is_found(data: st.DataObject) -> None:
    """Whatever two books are: what only one has, and what both have differently."""
    of = st.dictionaries(st.integers(0, 2000), st.integers(0, 2), max_size=400)
    base, ours, theirs = data.draw(st.integers(0, 900)), data.draw(of), data.draw(of)

    def books(changes: dict[int, int]) -> dict[int, EntrySummary]:
        amounts = {**dict.fromkeys(range(base), 5), **changes}
        return {
            n: EntrySummary(A.node_id, f"req_{n}", 0, 0, "credits", value, bytes(32))
            for n, value in amounts.items()
            if value
        }

    mine, its = books(ours), books(theirs)
    compared, there, asked = Comparison(EntryTree(mine.values())), EntryTree(its.values()), 0
    while prefixes := compared.next_prefixes(w.MAX_RANGES):
        asked += len(prefixes)
        for prefix in prefixes:
            frame = wire.encode(w.RangeHashes([there.range(prefix)]))
            compared.compare(prefix, wire.decode(frame, w.decoder).ranges[0])  # type: ignore[union-attr]

    def names(entries: Iterable[Any]) -> set[str]:
        return {entry.request_id for entry in entries}

    assert names(compared.only_ours.values()) == {f"req_{n}" for n in mine.keys() - its.keys()}
    assert names(compared.only_theirs.values()) == {f"req_{n}" for n in its.keys() - mine.keys()}
    changed = {n for n in mine.keys() & its.keys() if mine[n] != its[n]}
    assert names(one for one, _ in compared.different.values()) == {f"req_{n}" for n in changed}
    assert asked <= 1 + 256


def test_one_difference_among_many_takes_few_questions() -> None:
    items = [
        EntrySummary(A.node_id, f"req_{n}", 0, 0, "credits", 1, bytes(32)) for n in range(50_000)
    ]
    compared, there, asked = Comparison(EntryTree(items)), EntryTree(items[:-1]), 0
    while prefixes := compared.next_prefixes(w.MAX_RANGES):
        asked += len(prefixes)
        for prefix in prefixes:
            compared.compare(prefix, there.range(prefix))
    assert list(compared.only_ours.values()) == items[-1:] and asked <= 3


@given(st.data())
@settings(max_examples=25)
def test_both_agree_or_name_the_difference(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Random work, random losses on both sides, random contradictions."""
    fates = data.draw(
        st.lists(
            st.sampled_from(["both", "both", "only a", "only b", "not accepted", "contradicts"]),
            max_size=12,
        )
    )
    by = data.draw(st.sampled_from([A, B]))

    async def run() -> None:
        async with pair_in(tmp_path_factory.mktemp("pair")) as pair:
            for one, fate in zip(some(len(fates)), fates, strict=True):
                there = mirrored(one)
                if fate == "contradicts":
                    other = entry(A, B, one.request_id, served_by_us=one.served_by_us, ttft_ms=77)
                    there = mirrored(other)
                elif fate == "not accepted":
                    if one.served_by_us:
                        one = msgspec.structs.replace(one, acceptance=b"")
                    else:
                        there = msgspec.structs.replace(there, acceptance=b"")
                if fate != "only b":
                    await ledger_entry.record(pair.a, one, A.node_id)
                if fate != "only a":
                    await ledger_entry.record(pair.b, there, B.node_id)
            outcome = await pair.settle(by=by)
            wrong = [f"req_{n:04}" for n, fate in enumerate(fates) if fate == "contradicts"]
            assert [one.request_id for one in outcome.differences] == wrong
            ours, theirs = await pair.signed()
            assert ours == theirs and len(ours) == (1 if fates and not wrong else 0)
            if not wrong:
                assert len(set(await pair.sums())) == 1

    asyncio.run(run())


# -- breaking off ----------------------------------------------------------------------------------


class Breaking:
    """A stream that breaks at its n-th call, before or after it has done that."""

    def __init__(self, stream: Stream, at: int, *, after: bool) -> None:
        self._stream, self._left, self._after = stream, at, after

    async def _do(self, work: Callable[[], Awaitable[Any]]) -> Any:
        self._left -= 1
        if self._left == 0 and not self._after:
            self.abandon()
            raise LinkLost("broken by the test")
        done = await work()
        if self._left == 0:
            self.abandon()
            raise LinkLost("broken by the test")
        return done

    async def send(self, frame: bytes) -> None:
        await self._do(lambda: self._stream.send(frame))

    async def receive(self) -> bytes | None:
        found: bytes | None = await self._do(self._stream.receive)
        return found

    async def finish(self) -> None:
        await self._do(self._stream.finish)

    def abandon(self) -> None:
        self._stream.abandon()

    def leave(self) -> None:
        self._stream.leave()


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("again", [A, B], ids=["the same asks again", "the other asks"])
async def test_it_may_break_off_anywhere(tmp_path: Path, after: bool, again: Identity) -> None:
    broken = 0
    for at in itertools.count(1):
        folder = tmp_path / str(at)
        folder.mkdir()
        async with pair_in(folder) as pair:
            await pair.both(*some(6))
            await ledger_entry.record(pair.a, some(1, start=6)[0], A.node_id)
            await ledger_entry.record(pair.b, mirrored(some(1, start=7)[0]), B.node_id)
            try:
                await pair.settle(wrap=lambda stream, at=at: Breaking(stream, at, after=after))
                break
            except PeeringError:
                broken += 1
            await pair.both(*some(2, start=8))
            assert (await pair.settle(by=again)).differences == []
            ours, theirs = await pair.signed()
            assert ours == theirs and 1 <= len(ours) <= 2
            assert sum(ledger_statement.read(one).entries for one in ours) == 10
            assert len(set(await pair.sums())) == 1
    assert broken > 10


@pytest.mark.parametrize("again", [A, B], ids=["the same asks again", "the other asks"])
@pytest.mark.parametrize("crashing", [A, B], ids=["asker", "answerer"])
@pytest.mark.parametrize("written", [False, True], ids=["before", "after"])
async def test_a_box_that_dies_at_its_statement(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, again: Identity, crashing: Identity, written: bool
) -> None:
    await pair.both(*some(7))
    real = ledger_statement.settle

    async def dying(database: Database, *rest: Any) -> None:
        if database is not (pair.a if crashing is A else pair.b):
            return await real(database, *rest)
        if written:
            await real(database, *rest)
        raise LinkLost("the box is dead")

    with monkeypatch.context() as context:
        context.setattr(ledger_statement, "settle", dying)
        with pytest.raises(PeeringError):
            await pair.settle()
    await pair.both(*some(3, start=7))
    await pair.settle(by=again)
    ours, theirs = await pair.signed()
    assert ours == theirs
    assert sum(ledger_statement.read(one).entries for one in ours) == 10


async def test_a_box_that_lost_all_gets_it_back(tmp_path: Path) -> None:
    """As after a restore of an old backup: three statements, and what is open."""
    async with pair_in(tmp_path) as pair:
        for number in range(3):
            await pair.both(*some(4, start=4 * number))
            await pair.settle()
        await pair.both(*some(2, start=12))
        owed, _ = await pair.sums()
        async with Database(tmp_path / "new.db") as empty:
            pair.b = empty
            outcome = await pair.settle()
            assert outcome.given == 2 and await pair.sums() == (owed, owed)
            ours, theirs = await pair.signed()
            assert ours == theirs and len(ours) == 4


# -- a hostile peer --------------------------------------------------------------------------------


def wired(one: LedgerEntry, server: Identity, **changes: Any) -> w.SignedEntry:
    made = w.SignedEntry(
        server.node_id, one.amount, one.proof, one.signature, one.acceptance,
        one.request_id, one.leg, one.choice, one.currency,
    )  # fmt: skip
    return msgspec.structs.replace(made, **changes)


def summary(one: w.SignedEntry) -> EntrySummary:
    return EntrySummary(
        one.server, one.request_id, one.leg, one.choice, one.currency, one.amount,
        sha256(one.proof).digest(),
    )  # fmt: skip


GOOD = entry(A, B, "req_9", served_by_us=False)  # B served it, A accepted it
OF_C = entry(A, C, "req_9", served_by_us=False)
LIES = {
    "forged proof": wired(GOOD, B, signature=C.sign("pinaivu/proof/v1", GOOD.proof)),
    "forged acceptance": wired(GOOD, B, acceptance=B.sign(ACCEPTANCE_DOMAIN, GOOD.proof)),
    "altered amount": wired(GOOD, B, amount=GOOD.amount + 1),
    "altered proof": wired(GOOD, B, proof=GOOD.proof.replace(b'"leg":0', b'"leg":1'), leg=1),
    "replayed as another request": wired(GOOD, B, request_id="req_8"),
    "replayed as another leg": wired(GOOD, B, leg=3),
    "entry of another peer": wired(OF_C, C),
    "another's as its own": wired(OF_C, B),
    "paid already": wired(some(1)[0], B),
    "paid already, without its prompt": wired(some(1)[0], B, amount=some(1)[0].amount - 8_000_000),
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
async def test_nothing_false_is_taken(pair: Pair, lie: w.SignedEntry) -> None:
    """B asks A to take it, and, as the one who answers, has it in its books."""
    await pair.both(*some(4))
    await pair.settle()
    before = await ledger_entry.balances(pair.a)
    answering = asyncio.create_task(answer_as_a(pair))
    stream = await pair.back.open()
    talk = ReconcileSession(B, pair.b, A.node_id, stream)
    await talk.call(w.Begin(1, b""), w.Begin)
    refused = (await talk.call(w.TakeEntries([lie]), w.EntriesTaken)).refused
    assert list(refused) == [lie.key] and all(refused.values())
    stream.abandon()
    await soon(answering)

    async def lying(pair: Pair) -> None:
        stream = await pair.back.accept()
        talk = ReconcileSession(B, pair.b, A.node_id, stream)
        began = await talk.expect(w.Begin)
        await talk.send(began)
        answers: dict[type, Any] = {
            w.Unaccepted: w.ClaimEntries([]),
            w.Look: w.LedgerDigest(1),
            w.AskRanges: w.RangeHashes([reconcile.EntryRange([summary(lie)])]),
            w.GiveEntries: w.Entries([lie]),
        }
        while (frame := await talk.receive()) is not None:
            await talk.send(answers[type(frame)])
        await stream.finish()

    answering = asyncio.create_task(lying(pair))
    outcome = await soon(Ledger(A, pair.a).settle(B.node_id, await pair.link.open()))
    await soon(answering)
    (told,) = outcome.differences
    assert told.request_id == lie.request_id and told.ours is None and told.why
    assert outcome.statements == [] and await ledger_entry.balances(pair.a) == before


async def answer_as_a(pair: Pair) -> None:
    await Ledger(A, pair.a).handle(B.node_id, await pair.link.accept())


async def a_proposal(pair: Pair, **changes: Any) -> tuple[ReconcileSession, Any]:
    """B has looked at A's books, and what it would honestly propose, changed."""
    talk = ReconcileSession(B, pair.b, A.node_id, await pair.back.open())
    await talk.call(w.Begin(0, b""), w.Begin)
    await talk.call(w.Look(0), w.LedgerDigest)
    rows = await ledger_statement.open_entries(pair.b, A.node_id, "")
    talk.snapshot = EntrySnapshot(B.node_id, A.node_id, rows)
    return talk, msgspec.structs.replace(await talk.compose("2026-11-01T00:00:00Z"), **changes)


CHANGED: dict[str, dict[str, Any]] = {
    "a sum": {"served": {A.node_id: {"credits": "1"}, B.node_id: {}}},
    "the number": {"sequence": 2},
    "the one before": {"previous": "00" * 32},
    "the hash": {"entries_sha256": "00" * 32},
    "the count": {"entries": 3},
    "between whom": {"between": sorted([B.node_id, C.node_id])},
    "the cut": {"upto": "req_0001"},
    "the version": {"v": 2},
    "a time with a line break": {"at": "2026-11-01T00:00:00.000Z\n"},
    "a time in other digits": {"at": "\uff12\uff10\uff12\uff16-11-01T00:00:00.000Z"},
    "a time that is none": {"at": "=1+1"},
    "a cut with a line break": {"upto": "req_0001\n"},
}


@pytest.mark.parametrize("changes", CHANGED.values(), ids=CHANGED)
async def test_no_other_statement_is_signed(pair: Pair, changes: dict[str, Any]) -> None:
    await pair.both(*some(4))
    answering = asyncio.create_task(answer_as_a(pair))
    talk, statement = await a_proposal(pair, **changes)
    signed = canonical(statement)
    with pytest.raises(PeeringError):
        await talk.call(w.Propose(signed, B.sign(ledger_statement.DOMAIN, signed)), w.Agreed)
    talk.stream.abandon()
    await soon(answering)
    assert await ledger_statement.ls(pair.a) == []


async def test_a_proposal_must_be_signed_by_its_proposer(pair: Pair) -> None:
    await pair.both(*some(4))
    for signer, domain in ((C, ledger_statement.DOMAIN), (B, ACCEPTANCE_DOMAIN)):
        answering = asyncio.create_task(answer_as_a(pair))
        talk, statement = await a_proposal(pair)
        signed = canonical(statement)
        with pytest.raises(PeeringError, match="signature"):
            await talk.call(w.Propose(signed, signer.sign(domain, signed)), w.Agreed)
        talk.stream.abandon()
        await soon(answering)
    assert await ledger_statement.ls(pair.a) == []


FRAMES: dict[str, bytes] = {
    "garbage": b"\xc1" * 40,
    "another's frame": wire.encode(w.Agreed(bytes(64))),
    "too many parts": wire.encode(w.AskRanges([b""] * 100)),
    "a long prefix": wire.encode(w.AskRanges([bytes(33)])),
    "too many places": wire.encode(w.GiveEntries([bytes(32)] * 20_000)),
    "a huge number": wire.encode(w.Look(2**63)),
    "no such statement": wire.encode(w.Look(7)),
    "a statement that is none": wire.encode(w.Propose(b'{"v":1}', bytes(64))),
    "nested": wire.encode(w.Propose(b"[" * 200_000, bytes(64))),
}


@pytest.mark.parametrize("frame", FRAMES.values(), ids=FRAMES)
async def test_a_frame_that_is_none_ends_it(pair: Pair, frame: bytes) -> None:
    await pair.both(*some(4))
    answering = asyncio.create_task(answer_as_a(pair))
    stream = await pair.back.open()
    talk = ReconcileSession(B, pair.b, A.node_id, stream)
    await talk.call(w.Begin(0, b""), w.Begin)
    await stream.send(frame)
    with pytest.raises(BoxError):
        await soon(talk.receive())
    stream.abandon()
    await soon(answering)
    assert len((await pair.settle()).statements) == 1  # and it is none the worse for it


async def test_books_without_end_are_not_read(pair: Pair) -> None:
    """Every part of a part differs, for ever."""
    count = 0

    async def endless() -> None:
        nonlocal count
        stream = await pair.back.accept()
        talk = ReconcileSession(B, pair.b, A.node_id, stream)
        await talk.send(await talk.expect(w.Begin))
        await talk.expect(w.Unaccepted)
        await talk.send(w.ClaimEntries([]))
        await talk.expect(w.Look)
        await talk.send(w.LedgerDigest(10**9))
        with pytest.raises(PeeringError):
            while isinstance(frame := await talk.receive(), w.AskRanges):
                count += len(frame.prefixes)
                parts = [
                    reconcile.EntryRange([], bytes([count % 256]) * 4096) for _ in frame.prefixes
                ]
                await talk.send(w.RangeHashes(parts))

    answering = asyncio.create_task(endless())
    with pytest.raises(PeeringError, match="no end"):
        await soon(Ledger(A, pair.a).settle(B.node_id, await pair.link.open()))
    await soon(answering)
    assert count < 1000


# -- at once ---------------------------------------------------------------------------------------


@asynccontextmanager
async def answering(pair: Pair) -> AsyncIterator[tuple[Ledger, Ledger]]:
    """Both boxes take what the other opens."""
    ledgers = Ledger(A, pair.a), Ledger(B, pair.b)

    async def accept(ledger: Ledger, peer: Identity, link: Link) -> None:
        async with asyncio.TaskGroup() as tasks:
            while True:
                tasks.create_task(ledger.handle(peer.node_id, await link.accept()))

    serving = [
        asyncio.create_task(accept(ledgers[0], B, pair.link)),
        asyncio.create_task(accept(ledgers[1], A, pair.back)),
    ]
    yield ledgers
    for task in serving:
        task.cancel()
    await soon(asyncio.wait(serving))


@pytest.mark.parametrize("head_start", [-40, -9, -3, -1, 0, 1, 3, 9, 40])
async def test_both_settle_at_the_same_moment(pair: Pair, head_start: int) -> None:
    """Of two who begin so many turns of the loop apart, both get the one statement."""
    await pair.both(*some(20))
    await ledger_entry.record(pair.a, some(1, start=20)[0], A.node_id)

    async def settle(ledger: Ledger, peer: Identity, link: Link, turns: int) -> SettlementOutcome:
        for _ in range(turns):
            await asyncio.sleep(0)
        return await ledger.settle(peer.node_id, await link.open())

    async with answering(pair) as (a, b):
        first, second = await soon(
            asyncio.gather(
                settle(a, B, pair.link, max(0, -head_start)),
                settle(b, A, pair.back, max(0, head_start)),
            )
        )
        (made,) = first.statements
        assert [one.signed for one in second.statements] == [made.signed]
        assert ledger_statement.read(made.signed).entries == 21
        assert first.differences == second.differences == []
        assert (await soon(a.settle(B.node_id, await pair.link.open()))).statements == []
    ours, theirs = await pair.signed()
    assert ours == theirs == [made.signed]


async def test_a_waiting_peer_gets_keepalives(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long conversation under way: the other's command waits, and is no failure."""
    monkeypatch.setattr("pinaivu_box.ledger.session._WAIT_SECONDS", 0.01)
    await pair.both(*some(20))
    slow, waits, begins, both = asyncio.Event(), 0, 0, asyncio.Barrier(2)
    real = ReconcileSession.entries

    async def late(talk: ReconcileSession, places: Any) -> Any:
        await slow.wait()
        return await real(talk, places)

    async def counted(talk: ReconcileSession, frame: w.Frame) -> None:
        nonlocal waits, begins
        waits += isinstance(frame, w.SessionBusy)
        begins += isinstance(frame, w.Begin)
        if isinstance(frame, w.Begin) and begins <= 2:
            await both.wait()  # neither hears of the other before it has asked itself
        if waits == 3:
            slow.set()
        await send(talk, frame)

    send = ReconcileSession.send
    monkeypatch.setattr(ReconcileSession, "entries", late)
    monkeypatch.setattr(ReconcileSession, "send", counted)
    await ledger_entry.record(pair.a, some(1, start=20)[0], A.node_id)  # to be given
    async with answering(pair) as (a, b):
        one, two = await soon(
            asyncio.gather(
                a.settle(B.node_id, await pair.link.open()),
                b.settle(A.node_id, await pair.back.open()),
            )
        )
    assert waits >= 3 and one.statements[0].signed == two.statements[0].signed


async def test_a_leader_that_breaks_off_stops_nobody(pair: Pair) -> None:
    """B waits for its turn while A settles; A is lost after B has signed, and then says that it has
    no statement: B's command ends with a sentence, and the next one mends it."""
    await pair.both(*some(4))
    b = Ledger(B, pair.b)
    settling = asyncio.create_task(b.settle(A.node_id, await pair.back.open()))
    waiting = ReconcileSession(A, pair.a, B.node_id, await pair.link.accept())
    await waiting.expect(w.Begin)
    talk = ReconcileSession(A, pair.a, B.node_id, await pair.link.open())
    handling = asyncio.create_task(b.handle(A.node_id, await pair.back.accept()))
    await talk.call(w.Begin(0, b""), w.Begin)
    await talk.call(w.Look(0), w.LedgerDigest)
    talk.snapshot = EntrySnapshot(
        A.node_id, B.node_id, await ledger_statement.open_entries(pair.a, B.node_id, "")
    )
    signed = canonical(await talk.compose("2026-11-01T00:00:00Z"))
    await talk.call(w.Propose(signed, A.sign(ledger_statement.DOMAIN, signed)), w.Agreed)
    await waiting.send(w.Begin(0, b""))
    talk.stream.abandon()
    with pytest.raises(PeeringError, match="settled meanwhile"):
        await soon(settling)
    await soon(handling)
    await pair.settle()
    ours, theirs = await pair.signed()
    assert ours == theirs == [signed]


async def test_two_commands_on_one_box_follow_each_other(pair: Pair) -> None:
    await pair.both(*some(20))
    async with answering(pair) as (a, _):
        streams = [await pair.link.open() for _ in range(3)]
        done = await soon(asyncio.gather(*[a.settle(B.node_id, one) for one in streams]))
    assert {one.statements[0].id for one in done} == {(await ledger_statement.ls(pair.a))[0].id}


async def test_no_more_wait_than_a_few(pair: Pair) -> None:
    async with answering(pair):
        streams = [await pair.link.open() for _ in range(9)]
        for stream in streams:
            await stream.send(wire.encode(w.Begin(0, b"")))
        refused = [wire.decode(await soon(one.receive()) or b"", w.decoder) for one in streams[8:]]
        assert [type(one) for one in refused] == [w.Reject]
        for stream in streams:
            stream.abandon()


# -- what is not accepted --------------------------------------------------------------------------


async def waiting_at_a(pair: Pair) -> int:
    found = await ledger_entry.balance(pair.a, B.node_id)
    return sum(one.waiting for one in found.values())


def unsigned(one: LedgerEntry) -> LedgerEntry:
    return msgspec.structs.replace(one, acceptance=b"")


async def receipt_at_b(pair: Pair, one: LedgerEntry, **changes: Any) -> None:
    """B's receipt of a request that A served a leg of; `changes` of the proof in it."""
    proof = msgspec.structs.replace(msgspec.json.decode(one.proof, type=Proof), **changes)
    signed = sign_proof(A if proof.witness is None else B, proof)
    receipt = Receipt(
        one.request_id, "2026-11-01T00:00:00.000Z", B.node_id, A.node_id, "m:1", "00" * 32, "0",
        "credits", "stop", {}, [signed], "11" * 32, "22" * 32, TokenUsage(20, 10, 5),
    )  # fmt: skip
    await pair.b.write(
        ("INSERT OR IGNORE INTO keys (id, account_id, hash, prefix, last_four, name, policy,"
         " created_at) VALUES ('key_1', 'acct_owner', x'00', '', '', '', '{}', 0)", ()),
        ("INSERT INTO receipts (request_id, key_id, created_at, signed, signature, opening,"
         " account_id, model) VALUES (?, 'key_1', 0, ?, x'00', x'00', 'acct_1', 'a:1')",
         (one.request_id, sign_receipt(B, receipt)[0])),
    )  # fmt: skip


@pytest.mark.parametrize("by", [A, B], ids=["server asks", "coordinator asks"])
async def test_an_unaccepted_entry_is_accepted_or_disputed_by_name(
    pair: Pair, by: Identity
) -> None:
    known, lost, other, unknown, late = (
        some(8, start=1)[0:2] + some(8, start=1)[3:5] + some(8, start=1)[6:7]
    )
    assert all(one.served_by_us for one in (known, lost, other, unknown, late))
    for one in (known, lost, other, unknown, late):
        await ledger_entry.record(pair.a, unsigned(one), A.node_id)
    await ledger_entry.record(
        pair.b, mirrored(late), B.node_id
    )  # its acceptance was lost on the way
    await receipt_at_b(pair, known)
    await receipt_at_b(pair, lost, witness=B.node_id, completion_tokens=1)
    await receipt_at_b(pair, other, ttft_ms=99)
    outcome = await pair.settle(by=by)
    assert (outcome.accepted, outcome.differences) == (2, [])
    reasons = {one.request_id: one.why for one in outcome.disputed}
    assert reasons.keys() == {one.request_id for one in (lost, other, unknown)}
    assert "after 1 tokens" in reasons[lost.request_id]
    assert "another proof" in reasons[other.request_id]
    assert "no receipt" in reasons[unknown.request_id]
    assert all(one.served_by == A.node_id for one in outcome.disputed)
    (made,) = outcome.statements
    assert ledger_statement.read(made.signed).entries == 2
    assert await waiting_at_a(pair) == lost.amount + other.amount + unknown.amount
    shown = {one.request_id: one for one in await ledger_entry.of_peer(pair.a, B.node_id, limit=9)}
    assert "no receipt" in (shown[unknown.request_id].disputed or "")
    assert shown[known.request_id].disputed is None and shown[known.request_id].acceptance


async def test_an_entry_that_is_written_off_uses_no_credit_until_it_is_accepted(
    pair: Pair,
) -> None:
    first, second = some(3, start=1)[:2]
    for one in (first, second):
        await ledger_entry.record(pair.a, unsigned(one), A.node_id)
    done = await claims.forgive(pair.a, B.node_id, Actor("cli:ann", "local"))
    assert done.entries == 2 and await waiting_at_a(pair) == 0
    (told,) = [one for one in await audit.ls(pair.a) if one.action == "ledger.forgive"]
    assert (told.target, told.detail["entries"]) == (B.node_id, 2)
    assert (await ledger_entry.balance(pair.a, B.node_id))["credits"].credit_used == 0
    assert (await claims.forgive(pair.a, B.node_id, Actor("cli:ann", "local"))).entries == 0
    assert len(await audit.ls(pair.a)) == 1
    assert (await pair.settle()).disputed == []  # nobody is asked about it any more
    await ledger_entry.record(pair.b, mirrored(first), B.node_id)
    assert (await pair.settle(by=B)).statements[0].signed
    found = (await ledger_entry.balance(pair.a, B.node_id))["credits"]
    assert (found.net, found.waiting) == (first.amount, 0)
    with pytest.raises(sqlite3.IntegrityError, match="append-only"):
        await pair.a.write(("UPDATE ledger_entries SET forgiven_at = NULL", ()))


FALSE = {
    "forged": {"signature": C.sign("pinaivu/proof/v1", b"")},
    "dearer": {"amount": GOOD.amount + 1},
    "another's": {"proof": OF_C.proof, "signature": OF_C.signature},
    "another leg": {"leg": 3},
}


@pytest.mark.parametrize("lie", FALSE.values(), ids=FALSE)
async def test_no_false_claim_is_accepted(pair: Pair, lie: dict[str, Any]) -> None:
    """Also of what the books have: B served it, and A has accepted it."""
    await ledger_entry.record(pair.a, GOOD, A.node_id)
    before = await ledger_entry.balances(pair.a)
    one = w.Claim(
        GOOD.amount, GOOD.proof, GOOD.signature, GOOD.request_id, GOOD.leg, GOOD.choice,
        GOOD.currency,
    )  # fmt: skip
    heard = asyncio.create_task(answer_as_a(pair))
    talk = ReconcileSession(B, pair.b, A.node_id, await pair.back.open())
    await talk.call(w.Begin(0, b""), w.Begin)
    said = await talk.call(w.ClaimEntries([one, msgspec.structs.replace(one, **lie)]), w.Judged)
    assert list(said.accepted.values()) == [GOOD.acceptance]
    assert len(said.disputed) == 1 and await ledger_entry.balances(pair.a) == before
    talk.stream.abandon()
    await soon(heard)


async def test_a_false_acceptance_is_none(pair: Pair) -> None:
    await ledger_entry.record(pair.a, unsigned(some(2)[1]), A.node_id)

    async def lying() -> None:
        talk = ReconcileSession(B, pair.b, A.node_id, await pair.back.accept())
        await talk.send(await talk.expect(w.Begin))
        shown = await talk.expect(w.ClaimEntries)
        place = reconcile.entry_key(A.node_id, shown.claims[0].request_id, 0, 0)
        await talk.send(w.Judged({place: C.sign(ACCEPTANCE_DOMAIN, shown.claims[0].proof)}, {}))

    task = asyncio.create_task(lying())
    with pytest.raises(PeeringError, match="acceptance is not"):
        await soon(Ledger(A, pair.a).settle(B.node_id, await pair.link.open()))
    await soon(task)
    assert await waiting_at_a(pair) == some(2)[1].amount
