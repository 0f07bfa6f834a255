"""The witness of other logs: it cosigns a checkpoint that is consistent with the last one that it
cosigned, and keeps it before the cosignature leaves the box.

A box's log that begins anew says so by a signed statement (`log.restart`).  One that names the last
checkpoint which this witness knows is a restart; one that names less has lost entries, which the
operator is told; without one nothing is cosigned.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import defaultdict
from collections.abc import Callable

import msgspec

from pinaivu_box.bounded import BoundedDict
from pinaivu_box.identity import Identity
from pinaivu_box.log import checkpoint, evidence, note, restart
from pinaivu_box.log.note import Note, NoteError, NoteKey, NoteSignature
from pinaivu_box.log.restart import Restart, SignedRestart
from pinaivu_box.store import witnessed
from pinaivu_box.store.database import Database
from pinaivu_box.store.witnessed import Witnessed
from pinaivu_box.witness import rules
from pinaivu_box.witness.alarms import Alarms
from pinaivu_box.witness.rules import Rejected, Submission, TreeHead

MAX_LOGS_PER_BOX = 64  # histories of one box; each restart begins one
_MAX_SILENT = 2  # times that a new log may come without a statement


class NoStatement(Rejected):
    """The box has another log; `former` is the last checkpoint of it."""

    def __init__(self, former: str) -> None:
        super().__init__(422, "The box has another log, and no statement of a restart came.")
        self.former = former


class Witness:
    """`key_of` says which key signs the checkpoints of an origin, None if the log is not witnessed
    here."""

    def __init__(
        self,
        identity: Identity,
        database: Database,
        alarms: Alarms,
        key_of: Callable[[str], NoteKey | None],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._identity, self._database, self._alarms = identity, database, alarms
        self._key_of, self._clock = key_of, clock
        self.last: dict[str, Witnessed] = {}  # by origin, as on disk
        self._origins: dict[str, str] = {}  # by their SHA-256 in hex
        self._silent: BoundedDict[str, int] = BoundedDict(1024)  # new logs without statements
        self._turns: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def open(self) -> None:
        for each in await witnessed.load(self._database):
            self._note(each)

    def _note(self, new: Witnessed) -> None:
        self.last[new.origin] = new
        self._origins[hashlib.sha256(new.origin.encode()).hexdigest()] = new.origin

    def named(self, origin_hash: str) -> Witnessed | None:
        """By the SHA-256 of its origin, in hex."""
        return self.last.get(self._origins.get(origin_hash, ""))

    def logs_of(self, node_id: str) -> list[Witnessed]:
        """The histories of a box that are known here, the oldest first."""
        found = [each for each in self.last.values() if each.node_id == node_id]
        return sorted(found, key=lambda each: checkpoint.epoch_of(each.origin))

    async def add_checkpoint(
        self, submission: Submission, statement: bytes = b"", *, by_log: bool = False
    ) -> NoteSignature:
        """Cosign a checkpoint.  `statement` is that of a log which begins anew; `by_log`: the box
        whose log it is has sent this itself.  The cosignature is on disk before it is returned.
        Raises Rejected."""
        head = rules.head_of(submission.note)
        if (key := self._key_of(head.origin)) is None:
            raise Rejected(404, "This witness does not know the log.")
        own = rules.own_signature(submission.note, key)
        signed = Note(submission.note.text, (own,))
        box = _box_of(head.origin)
        async with self._turns[box or head.origin]:
            last = self.last.get(head.origin)
            if last is not None:
                await self._check_fork(last, signed, head, submission.proof)
            rules.judge(submission, head, _head(last))
            if box:
                former = self.logs_of(box)
                if last is None and former:
                    await self._check_new(head, former, statement, by_log)
                elif last is not None and former[-1] is not last:
                    raise Rejected(422, "The box has given this log up, and began another one.")
            return await self._keep(head, signed, last, statement)

    async def _keep(
        self, head: TreeHead, signed: Note, last: Witnessed | None, statement: bytes
    ) -> NoteSignature:
        now = int(self._clock())
        signature = checkpoint.cosign(self._identity, signed.text, now)
        kept = Witnessed(
            origin=head.origin,
            node_id=_box_of(head.origin),
            size=head.size,
            root=head.root,
            note=str(Note(signed.text, (*signed.signatures, signature))),
            cosigned_at=now,
            restart=last.restart if last else _kept(statement, head.origin),
        )
        if not await witnessed.keep(self._database, kept, last):
            raise Rejected(409, "Another checkpoint was cosigned meanwhile.", head.size)
        self._note(kept)
        return signature

    async def _check_fork(
        self, last: Witnessed, signed: Note, head: TreeHead, proof: tuple[bytes, ...]
    ) -> None:
        """Keep evidence if this checkpoint and the last one are two histories.  Raises Rejected."""
        if not last.node_id or (head.size, head.root) == (last.size, last.root):
            return
        try:
            fork = evidence.fork(note.read(last.note), signed, proof)
        except NoteError:
            return  # the rules say what is wrong with it
        if fork is not None:
            await self._alarms.add_evidence(fork.document)
            raise Rejected(422, "The log has signed two histories: this is kept as evidence.")

    # A log that begins beside a former one

    async def _check_new(
        self, head: TreeHead, former: list[Witnessed], statement: bytes, by_log: bool
    ) -> None:
        """Raises Rejected if no statement says that it follows the former ones."""
        if len(former) >= MAX_LOGS_PER_BOX:
            raise Rejected(422, "The box has begun too many logs.")
        before = former[-1]
        if checkpoint.epoch_of(head.origin) < checkpoint.epoch_of(before.origin):
            raise Rejected(422, "The box has begun a later log since.")
        stated = read_statement(statement, head.origin)
        if stated is None:
            await self._note_silence(head, before, by_log)
            raise NoStatement(before.note)
        await self._check_lost(stated, before)

    async def _note_silence(self, head: TreeHead, before: Witnessed, by_log: bool) -> None:
        """A box whose disk was lost learns from the refusal what to state.  If it does not, the
        operator is told; not if others sent this, who may have left the statement out."""
        if not by_log:
            return
        self._silent[head.origin] = self._silent.get(head.origin, 0) + 1
        if self._silent[head.origin] > _MAX_SILENT:
            detail = (
                f"{before.node_id} has begun another log, {head.origin}, beside {before.origin}, "
                "and signs no statement about it."
            )
            await self._alarms.add("no-statement", head.origin, before.node_id, detail)

    async def _check_lost(self, stated: Restart, before: Witnessed) -> None:
        """Tell the operator what entries a restart has lost, as far as they are known here."""
        named = 0
        if stated.previous_origin == before.origin and stated.last_checkpoint is not None:
            seen = checkpoint.read(note.read(stated.last_checkpoint))
            head = TreeHead(seen.origin, seen.size, seen.root)
            await self._check_fork(before, note.read(stated.last_checkpoint), head, ())
            named = seen.size
        if named < before.size:
            detail = (
                f"{before.node_id} has restarted its log and lost {before.size - named} entries: "
                f"its statement names {named or 'none'} of the {before.size} that were cosigned."
            )
            await self._alarms.add("restart", stated.origin, before.node_id, detail)


def read_statement(statement: bytes, origin: str = "") -> Restart | None:
    """What it says, if it holds and is about the log with that origin, or any."""
    try:
        stated = restart.read(msgspec.json.decode(statement, type=SignedRestart))
    except (NoteError, msgspec.MsgspecError, RecursionError, ValueError):
        return None
    return stated if origin in ("", stated.origin) else None


def _kept(statement: bytes, origin: str) -> bytes:
    return statement if read_statement(statement, origin) else b""


def _box_of(origin: str) -> str:
    """The box whose log it is; empty if it is no box's."""
    try:
        return checkpoint.node_of(origin)
    except NoteError:
        return ""


def _head(last: Witnessed | None) -> TreeHead | None:
    return TreeHead(last.origin, last.size, last.root) if last else None
