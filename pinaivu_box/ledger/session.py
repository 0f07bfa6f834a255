"""One side of the ledger's conversation: frames there and back, and what is answered to each."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from contextlib import suppress
from hashlib import sha256
from typing import TypeVar

from pinaivu_box.errors import EntryRefused, PeeringError, ProtocolError
from pinaivu_box.identity import Identity, verify
from pinaivu_box.ledger import entry as ledger_entry
from pinaivu_box.ledger import reconcile
from pinaivu_box.ledger import statement as ledger_statement
from pinaivu_box.ledger import wire as w
from pinaivu_box.ledger.claims_exchange import ClaimsExchange
from pinaivu_box.ledger.entry import LedgerEntry
from pinaivu_box.ledger.reconcile import DOMAIN, EntryTree, Item, Statement
from pinaivu_box.ledger.statement import StoredStatement
from pinaivu_box.store.audit import Actor
from pinaivu_box.store.database import Database, Row
from pinaivu_box.transport import wire
from pinaivu_box.transport.transport import Stream

MAX_FRAMES = 10_000  # of one conversation, each way
FRAME_SECONDS = 30.0

T = TypeVar("T", bound="w.Frame")


class EntrySnapshot:
    """What is compared: the books, which statement they are of, and where their rows are."""

    def __init__(self, us: str, peer: str, rows: Iterable[Row], upto: str = "") -> None:
        self.upto = upto
        self.rows: dict[bytes, int] = {}
        self.books = EntryTree()
        for row in rows:
            item = Item(us if row["served_by_us"] else peer, *row[2:])
            self.books.add(item)
            self.rows[item.place] = row["rowid"]


class ReconcileSession:
    def __init__(self, identity: Identity, database: Database, peer: str, stream: Stream) -> None:
        self.us, self.peer = identity.node_id, peer
        self.identity, self.database = identity, database
        self.stream = stream
        self.by = Actor(peer, "peering")  # who wants what is settled now
        self.shelf = EntrySnapshot(self.us, peer, ())
        self.claims = ClaimsExchange(identity, database, peer)
        self._frames = 0

    # -- frames ------------------------------------------------------------------------------------

    async def ask(self, frame: w.Frame, kind: type[T]) -> T:
        """The answer to a question.  PeeringError with the peer's sentence if it is sorry."""
        await self.send(frame)
        return await self.expect(kind)

    async def send(self, frame: w.Frame) -> None:
        async with asyncio.timeout(FRAME_SECONDS):
            await self.stream.send(wire.encode(frame))

    async def expect(self, kind: type[T], seconds: float | None = None) -> T:
        frame = await self.receive(seconds)
        if isinstance(frame, kind):
            return frame
        raise ProtocolError(f"{wire.short(self.peer)} gave no {kind.__name__}.")

    async def receive(self, seconds: float | None = None) -> w.Frame | None:
        """None once the peer has finished.  TimeoutError."""
        self._frames += 1
        if self._frames > MAX_FRAMES:
            raise ProtocolError(f"{wire.short(self.peer)} does not come to an end.")
        async with asyncio.timeout(seconds or FRAME_SECONDS):
            data = await self.stream.receive()
        if data is None:
            return None
        frame = wire.decode(data, w.decoder)
        if isinstance(frame, w.Reject):
            said = wire.printable(frame.message)
            raise PeeringError(f"{wire.short(self.peer)} does not agree: {said}")
        return frame

    async def sorry(self, message: str) -> None:
        """Say why, and wait until the peer has heard it: what is abandoned at once gets lost."""
        with suppress(PeeringError, TimeoutError):
            await self.send(w.Reject(message[: w.SENTENCE]))
            await self.stream.finish()
            while await self.receive() is not None:
                pass

    # -- answers -----------------------------------------------------------------------------------

    async def answer_all(self) -> None:
        """Until the peer is done, or has finished.  What it asks wrongly ends it with a Sorry."""
        while (frame := await self.receive()) is not None and not isinstance(frame, w.Done):
            try:
                answer = await self._answer(frame)
            except PeeringError as error:
                await self.sorry(error.message)
                raise
            await self.send(answer)

    async def _answer(self, frame: w.Frame) -> w.Frame:
        match frame:
            case w.Look():
                return await self._look(frame)
            case w.AskRanges():
                return w.RangeHashes([self.shelf.books.part(prefix) for prefix in frame.prefixes])
            case w.GiveEntries():
                return w.Entries(await self.given(frame.places))
            case w.TakeEntries():
                return w.EntriesTaken(await self._take(frame.entries))
            case w.ClaimEntries():
                return await self.claims.judge(frame)
            case w.Unaccepted():
                return await self.claims.show()
            case w.Judged():
                await self.claims.heard(frame)
                return w.EntriesTaken({})
            case w.Propose():
                return await self._agree(frame)
        raise ProtocolError(f"{type(frame).__name__} is no question.")

    async def _look(self, frame: w.Look) -> w.LedgerDigest:
        if not frame.statement:
            rows = await ledger_statement.open_items(self.database, self.peer, frame.upto)
            self.shelf = EntrySnapshot(self.us, self.peer, rows, frame.upto)
            return w.LedgerDigest(len(rows))
        found = await ledger_statement.get(self.database, self.peer, frame.statement)
        if found is None:
            raise ProtocolError(f"There is no statement {frame.statement} here.")
        rows = await ledger_statement.items_of(self.database, found.id)
        self.shelf = EntrySnapshot(self.us, self.peer, rows)
        return w.LedgerDigest(len(rows), found.signed, found.ours, found.theirs)

    async def given(self, places: Iterable[bytes]) -> list[w.WireEntry]:
        """The first of them, as many as fit into a frame; none for those that are not there."""
        rows = [self.shelf.rows[place] for place in places if place in self.shelf.rows]
        found = await ledger_statement.entries(self.database, rows)
        made: list[w.WireEntry] = []
        size = 0
        for row in rows:
            size += len(found[row].proof) + 1000
            if made and size > w.BATCH_BYTES:
                break
            made.append(self._wire(found[row]))
        return made

    def _wire(self, e: LedgerEntry) -> w.WireEntry:
        server = self.us if e.served_by_us else self.peer
        return w.WireEntry(
            server, e.amount, e.proof, e.signature, e.acceptance,
            e.request_id, e.leg, e.choice, e.currency,
        )  # fmt: skip

    async def _take(self, entries: list[w.WireEntry]) -> dict[bytes, str]:
        refused = {}
        for one in entries:
            item = item_of(one)
            if reason := await self.take(one, item):
                refused[item.place] = reason
        return refused

    async def take(self, one: w.WireEntry, item: Item) -> str:
        """Records an entry that we lack, if both signatures are good; otherwise says why not."""
        if one.server not in (self.us, self.peer):
            return "it is an entry of another peer"
        if self.shelf.upto and one.request_id > self.shelf.upto:
            return "it is beyond the cut"
        entry = LedgerEntry(
            self.peer, one.server == self.us, one.request_id, one.leg, one.choice, one.amount,
            one.currency, time.time_ns() // 1_000_000, one.proof, one.signature, one.acceptance,
        )  # fmt: skip
        try:
            await ledger_entry.record(self.database, entry, self.us)
        except EntryRefused as error:
            return error.message[: w.SENTENCE]
        if settled := await ledger_statement.statement_of(self.database, entry):
            return f"it is in {settled} already"
        self.shelf.books.add(item)
        return ""

    async def _agree(self, frame: w.Propose) -> w.Agreed:
        """Signs, and has it on disk before the peer hears of it."""
        asked = reconcile.read(frame.signed)
        last = await ledger_statement.last(self.database, self.peer)
        if asked != self.compose(last, asked.at):
            raise PeeringError(
                "its statement is not what this box's books say: they have changed meanwhile, "
                "settle again"
            )
        if not verify(self.peer, DOMAIN, frame.signed, frame.signature):
            raise ProtocolError("The proposal's signature is not its proposer's.")
        signature = self.identity.sign(DOMAIN, frame.signed)
        await self.keep(asked, frame.signed, signature, frame.signature)
        return w.Agreed(signature)

    # -- statements --------------------------------------------------------------------------------

    def compose(self, last: StoredStatement | None, at: str) -> Statement:
        """The next one, over what is on the shelf."""
        sequence, previous = (last.sequence, last.signed) if last else (0, b"")
        return reconcile.compose(
            self.shelf.books, (self.us, self.peer), sequence + 1, previous, self.shelf.upto, at
        )

    async def keep(
        self, statement: Statement, signed: bytes, ours: bytes, theirs: bytes
    ) -> StoredStatement:
        """On disk, with its entries.  EntryRefused if they are in another one meanwhile."""
        made = StoredStatement(
            id=reconcile.statement_id(signed),
            peer=self.peer,
            sequence=statement.sequence,
            at=time.time_ns() // 1_000_000,
            signed=signed,
            ours=ours,
            theirs=theirs,
        )
        rows = await ledger_statement.open_items(self.database, self.peer, statement.upto)
        places = self.shelf.books.items
        wanted = [
            n
            for place, n in EntrySnapshot(self.us, self.peer, rows).rows.items()
            if place in places
        ]
        if len(wanted) != statement.entries:
            raise EntryRefused("An entry of the statement is in another one meanwhile.")
        await ledger_statement.settle(self.database, made, wanted, self.by)
        return made


def item_of(one: w.WireEntry) -> Item:
    return Item(
        one.server, one.request_id, one.leg, one.choice, one.currency, one.amount,
        sha256(one.proof).digest(),
    )  # fmt: skip


async def head(talk: ReconcileSession) -> w.Begin:
    last = await ledger_statement.last(talk.database, talk.peer)
    if last is None:
        return w.Begin(0, b"")
    return w.Begin(last.sequence, sha256(last.signed).digest())
