"""Settling with a peer: both compare their books, give each other what one lacks, and sign.

If both begin at once, the conversation of the smaller node id goes first, and the other's waits for
its end.  Who is asked signs and writes first, the asker after it has that signature.  So if one is
cut off, the other is ahead by a statement; the next conversation, whoever begins it, starts with
that: the one behind asks for the statement, finds its own signature under it, and catches up.  Only
if the books are the same to the last digit anything is signed; otherwise the entries that differ
are named, and nothing is settled.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from msgspec import Struct
from msgspec.structs import replace

from pinaivu_box import amount
from pinaivu_box.errors import LinkLost, PeeringError, ProtocolError
from pinaivu_box.identity import Identity, verify
from pinaivu_box.ledger import reconcile
from pinaivu_box.ledger import statement as ledger_statement
from pinaivu_box.ledger import wire as w
from pinaivu_box.ledger.entry import LedgerEntry
from pinaivu_box.ledger.reconcile import DOMAIN, Compare, EntryTree, Item
from pinaivu_box.ledger.session import EntrySnapshot, ReconcileSession, head, item_of
from pinaivu_box.ledger.statement import StoredStatement
from pinaivu_box.receipts.receipt import canonical, utc_text
from pinaivu_box.store.audit import Actor
from pinaivu_box.store.database import Database
from pinaivu_box.transport import wire
from pinaivu_box.transport.transport import Stream

log = logging.getLogger("pinaivu.ledger")

MOST = 10_000  # entries of a statement, about; more make several
TOGETHER_SECONDS = 300.0  # for all of it
NAMED = 100  # differences that are told one by one
_WAIT_SECONDS = 10.0  # until who waits for another conversation hears that it still does
_MOST_TALKS = 8  # with one peer, nearly all of them waiting


class Difference(Struct, frozen=True):
    """An entry that keeps two boxes from settling: what each says of it, None if nothing."""

    request_id: str
    leg: int
    choice: int
    served_by: str
    ours: str | None
    theirs: str | None
    why: str


class SettlementOutcome(Struct, frozen=True):
    """`statements` were signed by both since we began; if there are `differences`, no more than
    these.  `taken`: entries that we lacked, `given`: that the peer did.  `accepted`: what had
    waited for that, on either side; `disputed`: what was not, and stands in no statement."""

    statements: list[StoredStatement]
    differences: list[Difference]
    taken: int
    given: int
    accepted: int
    disputed: list[Difference]


class Ledger:
    def __init__(self, identity: Identity, database: Database) -> None:
        self._identity = identity
        self._database = database
        self._talks: Counter[str] = Counter()
        self._turns: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        # Of peers that we have asked and that have not answered yet: for theirs, if they lead.
        self._asked: dict[str, asyncio.Lock] = {}

    async def settle(self, peer: str, stream: Stream, by: Actor | None = None) -> SettlementOutcome:
        """Over a stream that we opened.  PeeringError if the other does not agree or breaks off.
        `by`: for the audit trail."""
        async with self._with(peer, stream) as talk:
            talk.by = by or talk.by
            before = (await head(talk)).last
            async with self._turns[peer]:
                ours, theirs = await self._begin(talk)
                if theirs.last < ours.last:
                    await talk.answer_all()
                await catch_up(talk, theirs)
                outcome = await _propose_all(talk)
                await stream.finish()
                await talk.receive()
            made = await ledger_statement.ls(self._database, peer)
        return replace(outcome, statements=[one for one in made[::-1] if one.sequence > before])

    async def _begin(self, talk: ReconcileSession) -> tuple[w.Begin, w.Begin]:
        """Our head and the peer's, once it has nobody before us."""
        self._asked[talk.peer] = its_turn = asyncio.Lock()
        try:
            theirs = None
            while not isinstance(theirs, w.Begin):
                ours = await head(talk)
                await talk.send(ours)
                theirs = await talk.receive()
                if not isinstance(theirs, w.Begin | w.Wait):
                    raise ProtocolError(f"{wire.short(talk.peer)} gave no Begin.")
        finally:
            del self._asked[talk.peer]
        async with its_turn:  # what it began while we waited has ended
            if await head(talk) != ours:
                raise PeeringError("The peer has settled meanwhile: settle again.")
        return ours, theirs

    async def handle(self, peer: str, stream: Stream) -> None:
        """The answering side: `network.handlers["ledger"]`."""
        try:
            async with self._with(peer, stream) as talk:
                # If it waits for a turn of its own, it may be long in beginning.
                theirs = await talk.expect(w.Begin, TOGETHER_SECONDS)
                while (turn := self._turn(peer)).locked():
                    with suppress(TimeoutError):
                        async with asyncio.timeout(_WAIT_SECONDS), turn:
                            pass
                    theirs = await talk.ask(w.Wait(), w.Begin)
                async with turn:
                    ours = await head(talk)
                    await talk.send(ours)
                    if ours.last < theirs.last:
                        await catch_up(talk, theirs)
                        await talk.send(w.Done())
                    await talk.answer_all()
                    await stream.finish()
        except PeeringError as error:
            log.info("settling with %s ended: %s", wire.short(peer), error.message)

    def _turn(self, peer: str) -> asyncio.Lock:
        """What its conversation needs: if both wait for each other, the smaller node id leads."""
        if peer < self._identity.node_id and peer in self._asked:
            return self._asked[peer]
        return self._turns[peer]

    @asynccontextmanager
    async def _with(self, peer: str, stream: Stream) -> AsyncIterator[ReconcileSession]:
        """Whatever happens, the stream has an end."""
        talk = ReconcileSession(self._identity, self._database, peer, stream)
        self._talks[peer] += 1
        try:
            if self._talks[peer] > _MOST_TALKS:
                await talk.sorry("too many wait to settle, try again")
                raise PeeringError("Too many wait to settle with this peer: try again.")
            async with asyncio.timeout(TOGETHER_SECONDS):
                yield talk
        except TimeoutError:
            stream.abandon()
            raise LinkLost(f"{wire.short(peer)} took too long: settle again.") from None
        except BaseException:
            stream.abandon()
            raise
        finally:
            self._talks[peer] -= 1


async def catch_up(talk: ReconcileSession, theirs: w.Begin) -> None:
    """Take over the statements that the peer has and we lost, after we had signed them."""
    ours = await head(talk)
    while ours.last < theirs.last:
        await _take_statement(talk, ours.last + 1)
        ours = await head(talk)
    if ours.last == theirs.last and ours.head != theirs.head:
        raise PeeringError(
            f"The two boxes have different statements {ours.last}: compare those that 'pinaivu "
            "ledger statements' shows on both."
        )


async def _take_statement(talk: ReconcileSession, sequence: int) -> None:
    found = await talk.ask(w.Look(sequence), w.LedgerDigest)
    statement = reconcile.read(found.signed)
    if not (
        verify(talk.us, DOMAIN, found.signed, found.yours)
        and verify(talk.peer, DOMAIN, found.signed, found.ours)
    ):
        raise ProtocolError(f"Statement {sequence} is not signed by both.")
    rows = await ledger_statement.open_items(talk.database, talk.peer, statement.upto)
    talk.shelf = EntrySnapshot(talk.us, talk.peer, rows, statement.upto)
    compared = await _compare(talk)
    refused = await _fetch(talk, compared.only_theirs)
    for place in (*compared.only_ours, *compared.different):
        talk.shelf.books.items.pop(place, None)
    talk.shelf.books = EntryTree(talk.shelf.books.items.values())
    last = await ledger_statement.last(talk.database, talk.peer)
    if refused or compared.different or statement != talk.compose(last, statement.at):
        raise PeeringError(f"Statement {sequence}, signed by both, is not what the entries say.")
    await talk.keep(statement, found.signed, found.yours, found.ours)


async def _propose_all(talk: ReconcileSession) -> SettlementOutcome:
    await _claim_all(talk)
    taken = given = 0
    while True:
        upto = await ledger_statement.cut(talk.database, talk.peer, MOST)
        rows = await ledger_statement.open_items(talk.database, talk.peer, upto)
        talk.shelf = EntrySnapshot(talk.us, talk.peer, rows, upto)
        await talk.ask(w.Look(0, upto), w.LedgerDigest)
        compared = await _compare(talk)
        refused = await _fetch(talk, compared.only_theirs)
        declined = await _push(talk, compared.only_ours)
        taken += len(compared.only_theirs) - len(refused)
        given += len(compared.only_ours) - len(declined)
        differences = _named(compared, refused, declined)
        done = bool(differences) or not talk.shelf.books.items
        if not done:
            await _propose(talk)
        if done or not upto:
            disputed = [_disputed(talk.us, *one) for one in talk.claims.disputed.items()]
            accepted = talk.claims.accepted
            return SettlementOutcome([], differences, taken, given, accepted, disputed[:NAMED])


async def _claim_all(talk: ReconcileSession) -> None:
    """Show what the peer has not accepted, and look at what it says that we have not."""
    if (shown := await talk.claims.show()).claims:
        await talk.claims.heard(await talk.ask(shown, w.Judged))
    if (claimed := await talk.ask(w.Unaccepted(), w.ClaimEntries)).claims:
        await talk.ask(await talk.claims.judge(claimed), w.EntriesTaken)


async def _propose(talk: ReconcileSession) -> StoredStatement:
    last = await ledger_statement.last(talk.database, talk.peer)
    statement = talk.compose(last, utc_text(time.time()))
    signed = canonical(statement)
    ours = talk.identity.sign(DOMAIN, signed)
    agreed = await talk.ask(w.Propose(signed, ours), w.Agreed)
    if not verify(talk.peer, DOMAIN, signed, agreed.signature):
        raise ProtocolError(f"{wire.short(talk.peer)} signed something else than the statement.")
    return await talk.keep(statement, signed, ours, agreed.signature)


async def _compare(talk: ReconcileSession) -> Compare:
    compared = Compare(talk.shelf.books)
    while prefixes := compared.questions(w.ASKED):
        answer = await talk.ask(w.AskRanges(prefixes), w.RangeHashes)
        if len(answer.parts) != len(prefixes):
            raise ProtocolError(f"{wire.short(talk.peer)} gave other parts than it was asked for.")
        for prefix, part in zip(prefixes, answer.parts, strict=True):
            compared.take(prefix, part)
    return compared


async def _fetch(talk: ReconcileSession, wanted: dict[bytes, Item]) -> dict[bytes, str]:
    """Ask for what we lack; of what is not taken, why."""
    refused: dict[bytes, str] = {}
    left = list(wanted)
    while left:
        answer = await talk.ask(w.GiveEntries(left[: w.TOGETHER]), w.Entries)
        got = {(item := item_of(one)).place: (one, item) for one in answer.entries}
        if not got or not set(left[: w.TOGETHER]).issuperset(got):
            return refused | dict.fromkeys(left, "it is listed and not given")
        for place, (one, item) in got.items():
            if reason := await talk.take(one, item):
                refused[place] = reason
        left = [place for place in left if place not in got]
    return refused


async def _push(talk: ReconcileSession, lacked: dict[bytes, Item]) -> dict[bytes, str]:
    """Give the peer what it lacks; of what it does not take, why."""
    refused: dict[bytes, str] = {}
    left = [place for place in lacked if place in talk.shelf.rows]
    while left:
        batch = await talk.given(left[: w.TOGETHER])
        refused |= (await talk.ask(w.TakeEntries(batch), w.EntriesTaken)).refused
        left = left[len(batch) :]
    return {place: why for place, why in refused.items() if place in lacked}


def _named(
    compared: Compare, refused: dict[bytes, str], declined: dict[bytes, str]
) -> list[Difference]:
    told = [
        _difference(ours, ours, theirs, "the two boxes have different entries for it")
        for ours, theirs in compared.different.values()
    ]
    for place, why in refused.items():
        item = compared.only_theirs[place]
        told.append(_difference(item, None, item, f"only the peer has it, and here {why}"))
    for place, why in declined.items():
        item = compared.only_ours[place]
        said = f"only we have it, and the peer says: {wire.printable(why)}"
        told.append(_difference(item, item, None, said))
    return sorted(told, key=lambda one: (one.request_id, one.leg, one.choice))[:NAMED]


def _difference(of: Item, ours: Item | None, theirs: Item | None, why: str) -> Difference:
    return Difference(
        of.request_id,
        of.leg,
        of.choice,
        of.server,
        None if ours is None else ours.worth,
        None if theirs is None else theirs.worth,
        why,
    )


def _disputed(us: str, of: LedgerEntry, why: str) -> Difference:
    worth = f"{amount.to_text(of.amount)} {of.currency}"
    if of.served_by_us:
        said = f"the peer does not accept it: {why}"
        return Difference(of.request_id, of.leg, of.choice, us, worth, None, said)
    said = f"this box does not accept it: {why}"
    return Difference(of.request_id, of.leg, of.choice, of.peer, None, worth, said)
