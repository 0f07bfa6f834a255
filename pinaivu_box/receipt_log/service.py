"""The log of a running box: checkpoints, proofs, tiles.

A checkpoint is on disk before anybody sees it, and is made only if its tree begins with that of the
one before.  Entries are appended by `store.requests.store_request`, with their receipts.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from pinaivu_box.errors import InvalidValue
from pinaivu_box.identity import Identity
from pinaivu_box.log import checkpoint, merkle, note, removal
from pinaivu_box.log.checkpoint import Checkpoint
from pinaivu_box.log.entry_proof import EntryProof
from pinaivu_box.log.note import Note, NoteError, NoteKey
from pinaivu_box.log.removal import Removal
from pinaivu_box.log.restart import SignedRestart
from pinaivu_box.log.tiles import TilePath
from pinaivu_box.receipt_log import examine, histories, last_shown, proofs, tree
from pinaivu_box.receipt_log.adoption import BATCH
from pinaivu_box.receipt_log.histories import Histories, SignedCheckpoint
from pinaivu_box.store import log as store
from pinaivu_box.store.database import Database, SqlStatement
from pinaivu_box.store.log import Log, LogDamaged, StoredCheckpoint, StoredRemoval
from pinaivu_box.store.times import now_ms

log = logging.getLogger("pinaivu.log")

_MIN_SECONDS = 1.0  # between two checkpoints that nobody needs for a proof
_MIN_SECONDS_FOR_PROOFS = 0.1  # before one that a proof waits for: cosignatures come for those kept
_ADOPTION_PAUSE_SECONDS = 0.01  # between batches: about half of the time is left to others
_COVERED_AFTER_SECONDS = 10.0  # an entry is covered by a checkpoint, if nobody asks for one before
_MAX_RANGES = 64  # of a statement of removals, before another begins


class ReceiptLog:
    """`open` first.  `listeners` are told of each new checkpoint, once it is on disk; they must not
    wait for anything."""

    def __init__(self, identity: Identity, database: Database, home: Path) -> None:
        self._identity = identity
        self._database = database
        self._home = home
        self.histories = Histories(identity, database, home)
        self.findings: list[str] = []  # at the start: clauses that say what was changed
        self.listeners: list[Callable[[Note], None]] = []
        self.covered = 0  # entries, by the checkpoint that was made last
        self._made_at = -_MIN_SECONDS
        self._proving = asyncio.Lock()  # held by who waits for a checkpoint that covers a receipt
        self._lock = asyncio.Lock()  # held while a checkpoint is made, or another log begins

    @property
    def current(self) -> Log:
        return self.histories.current

    @property
    def origin(self) -> str:
        return self.current.origin

    async def open(self) -> None:
        """Go on with the log, or begin another if that may not be.  Raises OSError,
        sqlite3.Error."""
        await self.histories.open()
        if self.histories.adoption is not None and self.histories.adoption.count:
            await self._newest()  # of these, each was looked at just now
        await self._examine()

    async def _examine(self) -> None:
        found = await asyncio.to_thread(examine.tail, self._database.path)
        self.findings = [finding.message for finding in found]
        for message in self.findings:
            log.error("the database was changed behind the box's back: %s", message)

    async def keep(self) -> None:
        """Until cancelled: cover entries by checkpoints, and give entries to older receipts."""
        while True:
            await self._adopt_for(_COVERED_AFTER_SECONDS)
            await self.cover()

    async def _adopt_for(self, seconds: float) -> None:
        """Take so long, in which older receipts get entries."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and await self._adopt():  # noqa: ASYNC110
            await asyncio.sleep(_ADOPTION_PAUSE_SECONDS)
        await asyncio.sleep(max(0.0, end - time.monotonic()))

    async def _adopt(self) -> bool:
        """One batch of receipts without an entry, if there are any; whether there may be more."""
        adoption = self.histories.adoption
        if adoption is None or adoption.done:
            return False
        try:
            async with self._lock:
                more = await self.histories.adopt(BATCH)
                if not more:
                    await self._examine()  # who is without an entry now has been inserted
        except sqlite3.Error as error:
            log.error("older receipts get no entries in the log now: %s", error)
            return False
        return more

    async def cover(self) -> None:
        """Make a checkpoint if the log has grown; errors are logged."""
        try:
            await self._newest()
        except (OSError, sqlite3.Error) as error:
            log.error("no checkpoint of the log could be made: %s", error)
        except Exception:
            log.exception("no checkpoint of the log could be made")

    async def checkpoint(self) -> Note:
        """The newest; made if the log has grown, at most one a second, and if it can be (the disk
        is not full): else that before."""
        stored = await store.last_checkpoint(self._database, self.current)
        if stored is None or time.monotonic() - self._made_at >= _MIN_SECONDS:
            try:
                stored = await self._newest()
            except (OSError, sqlite3.Error) as error:
                if stored is None:
                    raise
                log.error("no checkpoint of the log could be made: %s", error)
        return note.read(stored.note)

    async def latest(self, of: Log | None = None) -> StoredCheckpoint | None:
        """The newest that there is of the log, or of an earlier one; None before the first."""
        return await store.last_checkpoint(self._database, of or self.current)

    async def entry_proof(self, request_id: str) -> EntryProof | None:
        """As `proofs.of_receipt`, after a new checkpoint if none covers the receipt yet: ten a
        second at most, which those who ask meanwhile share.  Raises LogDamaged."""
        if found := await self._proof(request_id):
            return found
        async with self._proving:
            if found := await self._proof(request_id):
                return found
            pause = self._made_at + _MIN_SECONDS_FOR_PROOFS - time.monotonic()
            await asyncio.sleep(max(0.0, pause))
            await self._newest()
            return await self._proof(request_id)

    async def _proof(self, request_id: str) -> EntryProof | None:
        return await proofs.of_receipt(self._database, self.histories.all, request_id)

    async def inclusion(self, request_id: str) -> str | None:
        """`entry_proof` as receipts have it, for who wants the receipt first of all: None too if
        there can be none now (the log is damaged, the disk is full), which is logged."""
        try:
            proof = await self.entry_proof(request_id)
        except (LogDamaged, OSError, sqlite3.Error) as error:
            log.error("%s has no proof of inclusion: %s", request_id, error)
            return None
        return proof.in_receipts if proof is not None else None

    async def consistency(self, old: int, new: int) -> tuple[bytes, ...]:
        """As `proofs.of_growth`, of the current log.  Raises InvalidValue, LogDamaged."""
        return await proofs.of_growth(self._database, self.current, old, new)

    async def growth(self, origin: str, old: int, new: int) -> tuple[bytes, tuple[bytes, ...]]:
        """The root of the first `old` entries, and the proof that the first `new` begin with them:
        also of a log that has ended, as far as it goes.  Raises InvalidValue, LogDamaged."""
        of = next((each for each in self.histories.all if each.origin == origin), None)
        if of is None or (of.size is not None and new > of.size):
            raise InvalidValue("there is no such log, or not so much of it", field="origin")
        proof = await proofs.of_growth(self._database, of, old, new)
        return await tree.root(self._database, of, old), proof

    def statement(self) -> bytes:
        """What the box has signed about the log before this one, as JSON; empty if it has not."""
        of = self.current
        if of.restart is None or of.signature is None:
            return b""
        return msgspec.json.encode(SignedRestart(of.restart.decode(), of.signature.hex()))

    async def tile(self, path: TilePath) -> bytes | None:
        """As `proofs.tile`, of the current log.  Raises LogDamaged."""
        return await proofs.tile(self._database, self.current, path)

    async def add_cosignatures(self, signed: Note, keys: Sequence[NoteKey] = ()) -> int:
        """Keep the cosignatures of a note over one of the stored checkpoints: those of boxes, and
        by these keys; returns how many it has now.  Raises NoteError if one is not right, or the
        checkpoint is not known."""
        said = checkpoint.read(signed)
        for witness in checkpoint.witnesses_named(signed):
            checkpoint.cosignature(signed, witness)
        named = {checkpoint.witness_key(each).name for each in checkpoint.witnesses_named(signed)}
        new = [each for each in signed.signatures if each.name in named]
        new += [each for key in keys if (each := checkpoint.cosignature_by(signed, key))]
        async with self._lock:
            of = next((each for each in self.histories.all if each.origin == said.origin), None)
            stored = None
            if of is not None:
                stored = await store.checkpoint_of_size(self._database, of, said.size)
            if of is None or stored is None or note.read(stored.note).text != signed.text:
                raise NoteError("it is over no checkpoint that this box has")
            joined = note.joined(note.read(stored.note), new)
            joined = joined._replace(signatures=joined.signatures[: note.MAX_SIGNATURES])
            own = checkpoint.log_key(said.origin)
            count = sum(not each.is_by(own) for each in joined.signatures)
            await self._database.write(store.replace_note(of, said.size, str(joined), count))
        return count

    async def seen_elsewhere(self, signed: Note) -> None:
        """Take notice of a checkpoint of this box's that a witness has.

        If the log here does not lead to it, another begins; if it is of a log that this box has
        lost, the box says so.  Raises NoteError if it is not a checkpoint of this box's.
        """
        known = SignedCheckpoint(checkpoint.read(signed), signed)
        if known.checkpoint.node_id != self._identity.node_id:
            raise NoteError("it is another box's")
        if not checkpoint.is_signed(signed, known.checkpoint):
            raise NoteError("this box has not signed it")
        async with self._lock:
            epoch = checkpoint.epoch_of(known.checkpoint.origin)
            if known.checkpoint.origin == self.origin:
                if why := await self.histories.contradiction(known):
                    await self.histories.begin(f"{histories.BEHIND}: {why}.", known)
            elif epoch > self.current.epoch:
                await self.histories.begin(histories.REPLACED, known)
            elif all(known.checkpoint.origin != each.origin for each in self.histories.all):
                await self.histories.say(histories.LOST, known)

    async def removals(self, entries: Sequence[int]) -> list[SqlStatement]:
        """The statements that record, signed, that the receipts of the entries with these ids are
        deleted; for the transaction that deletes them."""
        statements = []
        for of in self.histories.all:
            if ranges := store.indices(of, entries):
                last = await store.last_removal(self._database, of)
                statements.append(self._removal(of, ranges, last))
        return statements

    def _removal(
        self, of: Log, ranges: list[removal.Range], last: StoredRemoval | None
    ) -> SqlStatement:
        row, joined = None, removal.joined(ranges)
        if last is not None:
            all_of = removal.joined([*self._removed(of, last), *ranges])
            if len(all_of) <= _MAX_RANGES:
                row, joined = last.id, all_of
        signed = removal.sign(self._identity, Removal(of.origin, joined))
        return store.put_removal(of, row, *signed)

    def _removed(self, of: Log, stored: StoredRemoval) -> list[removal.Range]:
        """What the box has signed there; what it has not signed is not signed anew."""
        try:
            before = removal.read(self._identity.node_id, stored.signed, stored.signature)
        except NoteError:
            return []
        return before.entries if before.origin == of.origin else []

    async def _newest(self) -> StoredCheckpoint:
        """The checkpoint of the log as it is now; another log begins if it cannot be signed."""
        async with self._lock:
            try:
                return await self._grown()
            except LogDamaged:
                if reason := await self.histories.broken():
                    await self.histories.begin(reason, None)
                return await self._grown()

    async def _grown(self) -> StoredCheckpoint:
        of = self.current
        last = await store.last_checkpoint(self._database, of)
        size = await store.size(self._database, of)
        if last is not None and last.size == size:
            return last
        await tree.extend(self._database, of, size)
        root = await tree.root(self._database, of, size)
        if last is not None:
            await self._check_consistent(of, last, size, root)
        signed = checkpoint.sign(self._identity, Checkpoint(of.origin, size, root))
        await asyncio.to_thread(last_shown.write, self._home, signed)
        await self._database.write(*store.put_checkpoint(of, size, now_ms(), str(signed)))
        self.covered, self._made_at = size, time.monotonic()
        for listener in self.listeners:
            listener(signed)
        return StoredCheckpoint(size, str(signed))

    async def _check_consistent(
        self, of: Log, last: StoredCheckpoint, size: int, root: bytes
    ) -> None:
        """Raises LogDamaged unless the tree begins with that of the last checkpoint."""
        before = checkpoint.read(note.read(last.note))
        if before.size > size:
            raise LogDamaged(f"it has {size} entries, and its checkpoint {before.size}")
        proof: list[bytes] = []
        if before.size:
            ranges = merkle.consistency_ranges(before.size, size)
            known = await tree.hashes(self._database, of, ranges)
            proof = [merkle.range_hash(*each, known.__getitem__) for each in ranges]
        if not merkle.is_consistent(before.size, before.root, size, root, proof):
            raise LogDamaged(f"its first {before.size} entries are not those of its checkpoint")
