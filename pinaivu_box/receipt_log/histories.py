"""When a log goes on, and when another begins.

A box must never sign two trees of one origin that do not agree.  So its log ends where the database
is not the one that it wrote last: after `pinaivu restore`, if an older copy was put in its place,
if entries were changed.  The next log has an origin of its own, and begins with what the box signs
about the one before (`log/restart.py`).
"""

from __future__ import annotations

import asyncio
import logging
import time
from pathlib import Path
from typing import NamedTuple

from pinaivu_box.identity import Identity
from pinaivu_box.log import checkpoint, note, restart
from pinaivu_box.log.checkpoint import Checkpoint
from pinaivu_box.log.note import Note, NoteError
from pinaivu_box.log.restart import Restart, SignedRestart
from pinaivu_box.receipt_log import last_shown, tree
from pinaivu_box.receipt_log.adoption import BEFORE_SERVING, Adoption
from pinaivu_box.store import log as store
from pinaivu_box.store.database import Database
from pinaivu_box.store.log import Log, LogDamaged
from pinaivu_box.store.times import now_ms
from pinaivu_box.text import utc_text

log = logging.getLogger("pinaivu.log")

RESTORED = "The box was restored from a backup."
LOST = "The database of the box was lost."
REPLACED = "The database was replaced by an older copy, or by another."
OTHER_KEY = "The key of the box was replaced."
BEHIND = "The log was behind what a witness has"
CHANGED = "The stored log was changed behind the box's back"


class SignedCheckpoint(NamedTuple):
    """A checkpoint of this box, with its signatures."""

    checkpoint: Checkpoint
    note: Note

    @property
    def order(self) -> tuple[int, int]:
        return checkpoint.epoch_of(self.checkpoint.origin), self.checkpoint.size


class Histories:
    """The logs of this home."""

    def __init__(self, identity: Identity, database: Database, home: Path) -> None:
        self._identity = identity
        self._database = database
        self._home = home
        self.all: list[Log] = []
        self.adoption: Adoption | None = None  # the latest one, since the start
        self.findings: list[str] = []  # reasons why a log could not go on, since the start

    @property
    def current(self) -> Log:
        return self.all[-1]

    async def read(self) -> None:
        self.all = await store.logs(self._database)

    async def open(self) -> None:
        """Go on with the last log, or begin another.  Raises OSError, sqlite3.Error."""
        await self.read()
        tasks = await store.pending(self._database)
        shown = self._shown()
        if reason := await self._reason(tasks, shown):
            await self.begin(reason, shown)
        elif not self.all:
            await self.begin(None, None)
        elif store.ADOPT in tasks:
            await self._adopt()

    async def begin(self, reason: str | None, known: SignedCheckpoint | None) -> None:
        """Begin another log, for that reason (a sentence; None: the box has had none)."""
        previous = self.all[-1] if self.all else None
        size = 0
        if previous is not None:
            size, known = await self._last_valid(previous, known)
        origin = self._new_origin(known)
        said = None
        if reason is not None:
            own = previous is not None and previous.node_id == self._identity.node_id
            was = previous.origin if previous is not None and own else None
            said = self._statement(origin, reason, known, was)
        await self._database.write(
            *(store.end(previous, size) if previous is not None else []),
            *(() if previous is not None else (store.to_do(store.ADOPT),)),
            store.begin(origin, *_columns(said)),
            store.done(store.RESTORED),
        )
        await self.read()
        fields = {"origin": origin, "reason": reason or ""}
        if reason is not None and reason not in (RESTORED, LOST):
            self.findings.append(reason)
        level = logging.WARNING if reason else logging.DEBUG  # of a new box nobody needs it
        log.log(level, "a log of receipts begins", extra={"fields": fields})
        await self._adopt()

    async def say(self, reason: str, known: SignedCheckpoint) -> None:
        """Sign, if nothing is said yet about what was before the current log, that it was this."""
        if self.current.restart is None:
            said = self._statement(self.current.origin, reason, known, None)
            await self._database.write(store.set_restart(self.current, *_signed(said)))
            await self.read()

    async def contradiction(self, known: SignedCheckpoint) -> str | None:
        """Why the current log cannot go on, if its stored entries do not lead to a checkpoint of
        it.  Hashes that are not those of the entries are made anew."""
        try:
            size = await store.size(self._database, self.current)
            if known.checkpoint.size > size:
                return f"it has {size} entries, and its checkpoint {known.checkpoint.size}"
            if await self._leads_to(known.checkpoint):
                return None
            await self._database.write(store.forget_tiles(self.current))
            if not await self._leads_to(known.checkpoint):
                return f"its first {known.checkpoint.size} entries are not those of its checkpoint"
        except LogDamaged as error:
            return error.message
        self.findings.append("Stored hashes of the log were changed: they were made anew.")
        log.error("stored hashes of the log were changed: they were made anew")
        return None

    async def _leads_to(self, said: Checkpoint) -> bool:
        await tree.extend(self._database, self.current, said.size)
        return await tree.root(self._database, self.current, said.size) == said.root

    async def broken(self) -> str | None:
        """Why the current log cannot go on, as a sentence, if it cannot."""
        shown = self._shown()
        if shown is not None and checkpoint.epoch_of(shown.checkpoint.origin) > self.current.epoch:
            return REPLACED
        try:
            await store.size(self._database, self.current)
        except LogDamaged as error:
            return f"{CHANGED}: {error.message}."
        last = await self._last_checkpoint(self.current)
        for known, reason in ((last, CHANGED), (shown, REPLACED.removesuffix("."))):
            if known is None or known.checkpoint.origin != self.current.origin:
                continue
            if why := await self.contradiction(known):
                return f"{reason}: {why}."
        return None

    async def _reason(self, tasks: set[str], shown: SignedCheckpoint | None) -> str | None:
        """Why another log has to begin after one that was before, if so."""
        if not self.all:
            return LOST if shown is not None else None
        if store.RESTORED in tasks:
            return RESTORED
        if not self.current.node_id:
            return f"{CHANGED}: its origin is none."
        if self.current.node_id != self._identity.node_id:
            return OTHER_KEY
        return await self.broken()

    def _shown(self) -> SignedCheckpoint | None:
        found = last_shown.read(self._home, self._identity.node_id)
        return SignedCheckpoint(*found) if found is not None else None

    async def _last_checkpoint(self, of: Log) -> SignedCheckpoint | None:
        stored = await store.last_checkpoint(self._database, of)
        return _known(stored.note, of.origin) if stored is not None else None

    async def _last_valid(
        self, of: Log, known: SignedCheckpoint | None
    ) -> tuple[int, SignedCheckpoint | None]:
        """How many entries of a log its newest checkpoint covers to which they still lead; and the
        latest of all checkpoints that are known of this box."""
        latest = [known] if known is not None else []
        valid = 0
        for stored in await store.checkpoints(self._database, of):
            if (found := _known(stored.note, of.origin)) is None:
                continue
            latest.append(found)
            try:
                root = await tree.root(self._database, of, found.checkpoint.size)
            except LogDamaged:
                continue
            if root == found.checkpoint.root:
                valid = found.checkpoint.size
                break
        return valid, max(latest, key=lambda each: each.order, default=None)

    def _new_origin(self, known: SignedCheckpoint | None) -> str:
        epochs = [each.epoch for each in self.all]
        if known is not None:
            epochs.append(checkpoint.epoch_of(known.checkpoint.origin))
        # Later than all before, whatever the clock says.
        epoch = max([now_ms(), *(each + 1 for each in epochs)])
        return checkpoint.origin(self._identity.node_id, epoch)

    def _statement(
        self, origin: str, reason: str, known: SignedCheckpoint | None, previous: str | None
    ) -> SignedRestart:
        own = known is not None and known.checkpoint.node_id == self._identity.node_id
        last = known if own else None
        return restart.sign(
            self._identity,
            Restart(
                node_id=self._identity.node_id,
                origin=origin,
                previous_origin=last.checkpoint.origin if last is not None else previous,
                last_checkpoint=str(_with_own_signature(last)) if last is not None else None,
                time=utc_text(time.time()),
                reason=reason,
            ),
        )

    async def _adopt(self) -> None:
        self.adoption = Adoption(self._database.path, self._identity.node_id)
        if await self.adopt(BEFORE_SERVING):
            log.info("older receipts get entries in the log while the box serves")

    async def adopt(self, most: int) -> bool:
        """Give entries to so many more receipts without one, if there are any; returns whether
        there may be more.  Not while a log begins.  Raises sqlite3.Error."""
        adoption = self.adoption
        if adoption is None or adoption.done:
            return False
        if await asyncio.to_thread(adoption.run, most):
            return True
        if adoption.count:
            fields = {"receipts": adoption.count}
            log.info("receipts have got entries in the log", extra={"fields": fields})
        return False


def _known(text: str, origin: str) -> SignedCheckpoint | None:
    """A stored checkpoint, if the box of that log has signed it."""
    try:
        signed = note.read(text)
        found = checkpoint.read(signed)
    except NoteError:
        return None
    right = found.origin == origin and checkpoint.is_signed(signed, found)
    return SignedCheckpoint(found, signed) if right else None


def _with_own_signature(known: SignedCheckpoint) -> Note:
    """Without cosignatures, of which a statement that is sent has no room for many."""
    key = checkpoint.log_key(known.checkpoint.origin)
    return Note(known.note.text, tuple(one for one in known.note.signatures if one.is_by(key)))


def _signed(statement: SignedRestart) -> tuple[bytes, bytes]:
    return statement.signed.encode(), bytes.fromhex(statement.signature)


def _columns(statement: SignedRestart | None) -> tuple[bytes | None, bytes | None]:
    return (None, None) if statement is None else _signed(statement)
