"""Settling with a peer: compare the entries, give each other what one lacks, and sign a statement.

If both begin at once, the session that the smaller node id began goes first, and the other waits
for its end.  The box that is asked signs and writes first, the asking box once it has that
signature.  So if the link is lost, the box that was asked is ahead by a statement, and the next
session, whoever begins it, starts with that: the box behind asks for the statement, finds its own
signature under it, and catches up.  A statement is signed only if the entries are the same to the
last digit; otherwise those that differ are named, and nothing is settled.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, suppress
from hashlib import sha256
from operator import attrgetter

from msgspec import Struct
from msgspec.structs import replace

from pinaivu_box.errors import EntryRefused, LinkLost, PeeringError, ProtocolError
from pinaivu_box.identity import Identity, verify
from pinaivu_box.ledger import entry as ledger_entry
from pinaivu_box.ledger import statement as ledger_statement
from pinaivu_box.ledger import wire as w
from pinaivu_box.ledger.claims import ClaimsExchange
from pinaivu_box.ledger.entry import LedgerEntry
from pinaivu_box.ledger.reconcile import Comparison, EntrySummary, EntryTree
from pinaivu_box.ledger.statement import DOMAIN, Statement, StoredStatement
from pinaivu_box.receipts.receipt import canonical
from pinaivu_box.store.audit import Actor
from pinaivu_box.store.database import Database, Row
from pinaivu_box.store.times import now_ms
from pinaivu_box.text import utc_text
from pinaivu_box.transport import wire
from pinaivu_box.transport.link import Stream
from pinaivu_box.transport.rpc import MessageStream

PURPOSE = "ledger"
MAX_FRAMES = 10_000  # of one session, each way
MAX_STATEMENT_ENTRIES = 10_000  # about; more make several statements
MAX_DIFFERENCES = 100  # that are named
FRAME_SECONDS = 30.0
SESSION_SECONDS = 300.0
_WAIT_SECONDS = 10.0  # until a peer that waits for another session hears that it still has to
_MAX_SESSIONS = 8  # with one peer, nearly all of them waiting

log = logging.getLogger("pinaivu.ledger")


class Difference(Struct, frozen=True):
    """An entry that keeps two boxes from settling: what each has, None if it has none."""

    request_id: str
    leg: int
    choice: int
    served_by: str
    ours: str | None
    theirs: str | None
    why: str


class SettlementOutcome(Struct, frozen=True):
    """`statements` are those that both have signed since the session began; if there are
    `differences`, no more can be signed.  `taken` counts the entries that this box lacked, `given`
    those that the peer did.  `accepted` counts the claims that were accepted, on either side;
    `disputed` are those that were not, and are in no statement."""

    statements: list[StoredStatement]
    differences: list[Difference]
    taken: int
    given: int
    accepted: int
    disputed: list[Difference]


class EntrySnapshot(EntryTree):
    """The entries that are compared, up to a request id, and their rows in the database."""

    def __init__(self, us: str, peer: str, rows: Iterable[Row], upto: str = "") -> None:
        super().__init__()
        self.upto = upto
        self.rowids: dict[bytes, int] = {}
        for row in rows:
            summary = EntrySummary(us if row["served_by_us"] else peer, *row[2:])
            self.add(summary)
            self.rowids[summary.key] = row["rowid"]


class ReconcileSession(MessageStream[w.Frame, w.Frame]):
    """One side of a session: messages there and back, and the response to each request."""

    def __init__(self, identity: Identity, database: Database, peer: str, stream: Stream) -> None:
        super().__init__(
            peer,
            stream,
            w.decoder,
            receive_seconds=FRAME_SECONDS,
            max_messages=MAX_FRAMES,
            rejection=w.Reject,
        )
        self.us = identity.node_id
        self.identity, self.database = identity, database
        self.by = Actor(peer, "peering")  # who settles, for the audit trail
        self.snapshot = EntrySnapshot(self.us, peer, ())
        self.claims = ClaimsExchange(identity, database, peer)

    async def reject(self, reason: str) -> None:
        """End the session with a sentence."""
        await self.end_with(w.Reject(reason[: w.MAX_REASON_CHARACTERS]))

    # -- responses ---------------------------------------------------------------------------------

    async def respond_to_all(self) -> None:
        """Respond to the peer's requests until it is done or has finished.

        Raises PeeringError after a request that was rejected.
        """
        while (frame := await self.receive()) is not None and not isinstance(frame, w.Done):
            try:
                response = await self._respond(frame)
            except PeeringError as error:
                await self.reject(error.message)
                raise
            await self.send(response)

    async def _respond(self, frame: w.Frame) -> w.Response:
        match frame:
            case w.Look():
                return await self._look(frame)
            case w.AskRanges():
                return w.RangeHashes([self.snapshot.range(p) for p in frame.prefixes])
            case w.GiveEntries():
                return w.Entries(await self.entries(frame.keys))
            case w.TakeEntries():
                return w.EntriesTaken(await self.take(frame.entries))
            case w.ClaimEntries():
                return await self.claims.judge(frame)
            case w.Unaccepted():
                return await self.claims.show()
            case w.Judged():
                await self.claims.take_judgement(frame)
                return w.EntriesTaken({})
            case w.Propose():
                return await self._agree(frame)
        raise ProtocolError(f"{type(frame).__name__} is not a request.")

    async def _look(self, frame: w.Look) -> w.LedgerDigest:
        if not frame.statement:
            await self.look_at_open(frame.upto)
            return w.LedgerDigest(len(self.snapshot.rowids))
        statement = await ledger_statement.get(self.database, self.peer, frame.statement)
        if statement is None:
            raise ProtocolError(f"There is no statement {frame.statement} here.")
        rows = await ledger_statement.entries_of(self.database, statement.id)
        self.snapshot = EntrySnapshot(self.us, self.peer, rows)
        return w.LedgerDigest(len(rows), statement.signed, statement.ours, statement.theirs)

    async def look_at_open(self, upto: str) -> None:
        """From now on the session is about the entries without a statement, up to that request."""
        rows = await ledger_statement.open_entries(self.database, self.peer, upto)
        self.snapshot = EntrySnapshot(self.us, self.peer, rows, upto)

    async def entries(self, keys: Iterable[bytes]) -> list[w.SignedEntry]:
        """The entries with these keys that are here, the first that fit into a frame."""
        rowids = [self.snapshot.rowids[key] for key in keys if key in self.snapshot.rowids]
        entries = await ledger_entry.by_rowid(self.database, rowids)
        return [w.SignedEntry.of(entry, self.us) for entry in w.fitting(entries)]

    async def take(self, entries: Iterable[w.SignedEntry]) -> dict[bytes, str]:
        """Record entries that this box lacks; returns why some are refused, by their keys."""
        refused = {}
        for entry in entries:
            if reason := await self._take(entry):
                refused[entry.key] = reason
        return refused

    async def _take(self, signed: w.SignedEntry) -> str:
        """Record an entry if both signatures are valid; returns "", or why not."""
        if signed.server not in (self.us, self.peer):
            return "it is an entry of another peer"
        if self.snapshot.upto and signed.request_id > self.snapshot.upto:
            return "it is beyond the last request that is compared"
        entry = signed.entry(self.us, self.peer)
        try:
            await ledger_entry.record(self.database, entry, self.us)
        except EntryRefused as error:
            return error.message[: w.MAX_REASON_CHARACTERS]
        if statement := await ledger_entry.statement_of(self.database, entry):
            return f"it is in {statement} already"
        self.snapshot.add(entry.summary(self.us))
        return ""

    async def _agree(self, frame: w.Propose) -> w.Agreed:
        """Sign a proposal; the statement is on disk before the peer gets the signature."""
        proposed = ledger_statement.read(frame.signed)
        if proposed != await self.compose(proposed.at):
            raise PeeringError(
                "its statement does not match this box's entries: they have changed meanwhile, "
                "settle again"
            )
        if not verify(self.peer, DOMAIN, frame.signed, frame.signature):
            raise ProtocolError("The proposal's signature is not its proposer's.")
        signature = self.identity.sign(DOMAIN, frame.signed)
        await self.keep(proposed, frame.signed, signature, frame.signature)
        return w.Agreed(signature)

    # -- statements --------------------------------------------------------------------------------

    async def head(self) -> w.Begin:
        """The latest statement of this box with the peer."""
        last = await ledger_statement.last(self.database, self.peer)
        return w.Begin(last.sequence, sha256(last.signed).digest()) if last else w.Begin(0, b"")

    async def compose(self, at: str) -> Statement:
        """The statement after the latest one, over the entries of the snapshot."""
        last = await ledger_statement.last(self.database, self.peer)
        between, snapshot = (self.us, self.peer), self.snapshot
        return ledger_statement.compose(snapshot, between, last, snapshot.upto, at)

    async def keep(self, statement: Statement, signed: bytes, ours: bytes, theirs: bytes) -> None:
        """Write a statement with its entries; it is on disk on return.

        Raises EntryRefused if one of them is in another statement meanwhile.
        """
        stored = StoredStatement(
            id=ledger_statement.statement_id(signed),
            peer=self.peer,
            sequence=statement.sequence,
            at=now_ms(),
            signed=signed,
            ours=ours,
            theirs=theirs,
        )
        rows = await ledger_statement.open_entries(self.database, self.peer, statement.upto)
        rowids = EntrySnapshot(self.us, self.peer, rows).rowids
        chosen = [rowid for key, rowid in rowids.items() if key in self.snapshot.entries]
        if len(chosen) != statement.entries:
            raise EntryRefused("An entry of the statement is in another one meanwhile.")
        await ledger_statement.settle(self.database, stored, chosen, self.by)


class Ledger:
    """Settles with peers, one session with each at a time."""

    def __init__(self, identity: Identity, database: Database) -> None:
        self._identity = identity
        self._database = database
        self._sessions: Counter[str] = Counter()
        self._turns: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        # Of peers that have not responded to our Begin yet, for a session of theirs before ours.
        self._their_turns: dict[str, asyncio.Lock] = {}

    async def settle(self, peer: str, stream: Stream, by: Actor | None = None) -> SettlementOutcome:
        """Settle over a stream that this box has opened; `by` is for the audit trail.

        Raises PeeringError if the peer does not agree, or the link is lost.
        """
        async with self._session(peer, stream) as session:
            session.by = by or session.by
            before = (await session.head()).last
            async with self._turns[peer]:
                ours, theirs = await self._begin(session)
                if theirs.last < ours.last:
                    await session.respond_to_all()
                await catch_up(session, theirs)
                outcome = await _propose_all(session)
                await stream.finish()
                await session.receive()
            statements = await ledger_statement.ls(self._database, peer)
        return replace(outcome, statements=[s for s in statements[::-1] if s.sequence > before])

    async def _begin(self, session: ReconcileSession) -> tuple[w.Begin, w.Begin]:
        """The latest statements of both boxes, once no other session goes before this one."""
        self._their_turns[session.peer] = their_turn = asyncio.Lock()
        try:
            theirs = None
            while not isinstance(theirs, w.Begin):
                ours = await session.head()
                await session.send(ours)
                theirs = await session.receive()
                if not isinstance(theirs, w.Begin | w.SessionBusy):
                    raise ProtocolError(f"{wire.short(session.peer)} did not send Begin.")
        finally:
            del self._their_turns[session.peer]
        async with their_turn:  # the session that it began while this one waited has ended
            if await session.head() != ours:
                raise PeeringError("The peer has settled meanwhile: settle again.")
        return ours, theirs

    async def handle(self, peer: str, stream: Stream) -> None:
        """Settle over a stream that the peer has opened."""
        try:
            async with self._session(peer, stream) as session:
                # If it waits for a turn of its own, it may take long to begin.
                theirs = await session.expect(w.Begin, SESSION_SECONDS)
                while (turn := self._turn(peer)).locked():
                    with suppress(TimeoutError):
                        async with asyncio.timeout(_WAIT_SECONDS), turn:
                            pass
                    theirs = await session.call(w.SessionBusy(), w.Begin)
                async with turn:
                    ours = await session.head()
                    await session.send(ours)
                    if ours.last < theirs.last:
                        await catch_up(session, theirs)
                        await session.send(w.Done())
                    await session.respond_to_all()
                    await stream.finish()
        except PeeringError as error:
            log.info("settling with %s ended: %s", wire.short(peer), error.message)

    def _turn(self, peer: str) -> asyncio.Lock:
        """The lock for the peer's session: if both wait for each other, the smaller node id goes
        first."""
        if peer < self._identity.node_id and peer in self._their_turns:
            return self._their_turns[peer]
        return self._turns[peer]

    @asynccontextmanager
    async def _session(self, peer: str, stream: Stream) -> AsyncIterator[ReconcileSession]:
        """A session whose stream is abandoned if it fails."""
        session = ReconcileSession(self._identity, self._database, peer, stream)
        self._sessions[peer] += 1
        try:
            async with session:
                if self._sessions[peer] > _MAX_SESSIONS:
                    await session.reject("too many wait to settle, try again")
                    raise PeeringError("Too many wait to settle with this peer: try again.")
                async with asyncio.timeout(SESSION_SECONDS):
                    yield session
        except TimeoutError:
            raise LinkLost(f"{wire.short(peer)} took too long: settle again.") from None
        finally:
            self._sessions[peer] -= 1


async def catch_up(session: ReconcileSession, theirs: w.Begin) -> None:
    """Write the statements that the peer has and this box lost after it had signed them."""
    ours = await session.head()
    while ours.last < theirs.last:
        await _take_statement(session, ours.last + 1)
        ours = await session.head()
    if ours.last == theirs.last and ours.head != theirs.head:
        raise PeeringError(
            f"The two boxes have different statements {ours.last}: compare those that 'pinaivu "
            "ledger statements' shows on both."
        )


async def _take_statement(session: ReconcileSession, sequence: int) -> None:
    digest = await session.call(w.Look(sequence), w.LedgerDigest)
    statement = ledger_statement.read(digest.signed)
    if not (
        verify(session.us, DOMAIN, digest.signed, digest.yours)
        and verify(session.peer, DOMAIN, digest.signed, digest.ours)
    ):
        raise ProtocolError(f"Statement {sequence} is not signed by both.")
    await session.look_at_open(statement.upto)
    comparison = await _compare(session)
    refused = await _fetch(session, comparison.only_theirs)
    session.snapshot.remove({*comparison.only_ours, *comparison.different})
    if refused or comparison.different or statement != await session.compose(statement.at):
        raise PeeringError(f"Statement {sequence}, signed by both, does not match the entries.")
    await session.keep(statement, digest.signed, digest.yours, digest.ours)


async def _propose_all(session: ReconcileSession) -> SettlementOutcome:
    await _exchange_claims(session)
    taken = given = 0
    while True:
        upto = await ledger_statement.cut(session.database, session.peer, MAX_STATEMENT_ENTRIES)
        await session.look_at_open(upto)
        await session.call(w.Look(0, upto), w.LedgerDigest)
        comparison = await _compare(session)
        refused = await _fetch(session, comparison.only_theirs)
        declined = await _push(session, comparison.only_ours)
        taken += len(comparison.only_theirs) - len(refused)
        given += len(comparison.only_ours) - len(declined)
        differences = _differences(comparison, refused, declined)
        final = bool(differences) or not session.snapshot.entries
        if not final:
            await _propose(session)
        if final or not upto:
            claims = session.claims
            disputed = [_disputed(session.us, *claim) for claim in claims.disputed.items()]
            return SettlementOutcome(
                [], differences, taken, given, claims.accepted, disputed[:MAX_DIFFERENCES]
            )


async def _exchange_claims(session: ReconcileSession) -> None:
    """Show the peer what it has not accepted, and judge what this box has not."""
    if (own_claims := await session.claims.show()).claims:
        await session.claims.take_judgement(await session.call(own_claims, w.Judged))
    if (claims := await session.call(w.Unaccepted(), w.ClaimEntries)).claims:
        await session.call(await session.claims.judge(claims), w.EntriesTaken)


async def _propose(session: ReconcileSession) -> None:
    statement = await session.compose(utc_text(time.time()))
    signed = canonical(statement)
    ours = session.identity.sign(DOMAIN, signed)
    agreed = await session.call(w.Propose(signed, ours), w.Agreed)
    if not verify(session.peer, DOMAIN, signed, agreed.signature):
        raise ProtocolError(f"{wire.short(session.peer)} signed something else.")
    await session.keep(statement, signed, ours, agreed.signature)


async def _compare(session: ReconcileSession) -> Comparison:
    comparison = Comparison(session.snapshot)
    while prefixes := comparison.next_prefixes(w.MAX_RANGES):
        response = await session.call(w.AskRanges(prefixes), w.RangeHashes)
        if len(response.ranges) != len(prefixes):
            raise ProtocolError(f"{wire.short(session.peer)} sent other ranges than asked for.")
        for prefix, theirs in zip(prefixes, response.ranges, strict=True):
            comparison.compare(prefix, theirs)
    return comparison


async def _fetch(session: ReconcileSession, missing: Iterable[bytes]) -> dict[bytes, str]:
    """Get the entries that this box lacks; returns why some are refused."""
    refused: dict[bytes, str] = {}
    remaining = list(missing)
    while remaining:
        batch = remaining[: w.MAX_ENTRIES]
        response = await session.call(w.GiveEntries(batch), w.Entries)
        received = {entry.key for entry in response.entries}
        if not received or not received <= set(batch):
            return refused | dict.fromkeys(remaining, "it is listed and not given")
        refused |= await session.take(response.entries)
        remaining = [key for key in remaining if key not in received]
    return refused


async def _push(session: ReconcileSession, missing: Iterable[bytes]) -> dict[bytes, str]:
    """Give the peer the entries that it lacks; returns why it refuses some."""
    refused: dict[bytes, str] = {}
    remaining = pushed = [key for key in missing if key in session.snapshot.rowids]
    while remaining:
        batch = await session.entries(remaining[: w.MAX_ENTRIES])
        refused |= (await session.call(w.TakeEntries(batch), w.EntriesTaken)).refused
        remaining = remaining[len(batch) :]
    return {key: reason for key, reason in refused.items() if key in pushed}


def _differences(
    comparison: Comparison, refused: dict[bytes, str], declined: dict[bytes, str]
) -> list[Difference]:
    differences = [
        _difference(ours, theirs, "the two boxes have different entries for it")
        for ours, theirs in comparison.different.values()
    ]
    for key, reason in refused.items():
        why = f"only the peer has it, and here {reason}"
        differences.append(_difference(None, comparison.only_theirs[key], why))
    for key, reason in declined.items():
        why = f"only we have it, and the peer says: {wire.printable(reason)}"
        differences.append(_difference(comparison.only_ours[key], None, why))
    differences.sort(key=attrgetter("request_id", "leg", "choice"))
    return differences[:MAX_DIFFERENCES]


def _difference(ours: EntrySummary | None, theirs: EntrySummary | None, why: str) -> Difference:
    entry = ours or theirs
    assert entry is not None
    return Difference(
        entry.request_id,
        entry.leg,
        entry.choice,
        entry.server,
        ours.price if ours else None,
        theirs.price if theirs else None,
        why,
    )


def _disputed(us: str, entry: LedgerEntry, reason: str) -> Difference:
    summary = entry.summary(us)
    if entry.served_by_us:
        return _difference(summary, None, f"the peer does not accept it: {reason}")
    return _difference(None, summary, f"this box does not accept it: {reason}")
