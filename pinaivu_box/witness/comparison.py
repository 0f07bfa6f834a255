"""What members tell each other about logs: the newest checkpoints that each has seen, and evidence.

A box that shows two histories of its log to two members is found out when these compare.  Of one
size, two checkpoints are evidence by themselves.  Of two sizes the log is asked to prove that they
agree; an honest one can.  What it sends instead is evidence if it leads to one of the checkpoints
(`log.evidence`); otherwise nothing is proven, and the operator is told.
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Callable, Iterable

from pinaivu_box.bounded import BoundedDict
from pinaivu_box.errors import PeeringError
from pinaivu_box.log import checkpoint, evidence, note
from pinaivu_box.log.checkpoint import Checkpoint
from pinaivu_box.log.merkle import is_consistent
from pinaivu_box.log.note import Note, NoteError
from pinaivu_box.receipt_log.service import ReceiptLog
from pinaivu_box.tasks import TaskSet
from pinaivu_box.transport import wire
from pinaivu_box.witness import wire as log_wire
from pinaivu_box.witness.alarms import Alarms
from pinaivu_box.witness.questions import Questions
from pinaivu_box.witness.seen import SeenCheckpoints
from pinaivu_box.witness.wire import (
    MAX_EVIDENCE,
    MAX_IDS,
    MAX_LINK_NOTE_CHARACTERS,
    MAX_NOTES,
    Compare,
    Compared,
    Consistency,
    Declined,
)
from pinaivu_box.witness.witness import Witness, read_statement

_MAX_COMPARED = 16384
_MAX_WAITING = 256  # pairs of checkpoints about which a log is to be asked

log = logging.getLogger("pinaivu.witness")


class LogComparison:
    """`is_known` says whether a node id is, or was, a member."""

    def __init__(
        self,
        node_id: str,
        witness: Witness,
        alarms: Alarms,
        questions: Questions,
        own_log: ReceiptLog,
        is_known: Callable[[str], bool],
    ) -> None:
        self._node_id, self._witness, self._alarms = node_id, witness, alarms
        self._questions, self._own_log, self._is_known = questions, own_log, is_known
        self._newest = SeenCheckpoints()
        self._agree: BoundedDict[tuple[str, int, bytes], None] = BoundedDict(_MAX_COMPARED)
        # Pairs whose log has not answered yet, by its box; the smaller one first.
        self._waiting: BoundedDict[tuple[Note, Note], None] = BoundedDict(_MAX_WAITING)
        self._turns: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._next = 0  # of the logs, which are told in turns
        self._tasks = TaskSet()

    async def close(self) -> None:
        await self._tasks.cancel()

    # What is told

    def summary(self) -> Compare:
        """Of as many logs as one message has room for, others each time."""
        notes = {each.origin: each.note for each in self._witness.last.values() if each.node_id}
        notes = {origin: str(signed) for origin, signed in self._newest.all()} | notes
        origins = sorted(notes)
        begin = self._next % max(1, len(origins))
        turn = [*origins[begin:], *origins[:begin]][:MAX_NOTES]
        self._next = begin + len(turn)
        ids = list(self._alarms.documents())[:MAX_IDS]
        return Compare(tuple(_short(notes[origin]) for origin in turn), tuple(ids))

    def known_of(self, node_id: str) -> tuple[str, ...]:
        """The last checkpoints of a box's logs, as they were seen here."""
        found = {each.origin: each.note for each in self._witness.logs_of(node_id)}
        for origin, signed in self._newest.of(node_id).items():
            found.setdefault(origin, str(signed))
        return tuple(_short(text) for text in found.values())[-MAX_NOTES:]

    async def answer(self, asked: Compare) -> Compared:
        """What a peer does not have, and what this box lacks."""
        other = []
        for _, seen in self._verified(asked.notes):
            if (known := self._known(seen.origin)) is not None:
                other.append(_short(str(known)))
        own = self._alarms.documents()
        await self.learn(asked.notes)
        given = [own[key] for key in own if key not in asked.evidence]
        wanted = [key for key in asked.evidence if key not in own]
        return Compared(tuple(other), tuple(given[:MAX_EVIDENCE]), tuple(wanted[:MAX_EVIDENCE]))

    # What is learned

    async def learn(self, notes: Iterable[str]) -> None:
        """Take checkpoints that a member has seen.  What no log has signed is passed over."""
        for signed, seen in self._verified(notes):
            if seen.node_id == self._node_id:
                await self._own_log.seen_elsewhere(signed)
            else:
                await self._take(signed, seen)

    async def learn_evidence(self, documents: Iterable[bytes]) -> None:
        """Keep what proves a fork, whoever brings it."""
        for document in documents:
            try:
                first, _ = evidence.read(document)
                if self._is_known(first.node_id):
                    await self._alarms.add_evidence(document)
            except NoteError as error:
                log.debug("a peer sent evidence that proves nothing: %s", error)

    async def _take(self, signed: Note, seen: Checkpoint) -> None:
        known = self._known(seen.origin)
        if known is None:
            self._newest.put(seen.origin, signed)
            return
        last = checkpoint.read(known)
        if (seen.size, seen.root) == (last.size, last.root):
            return
        if seen.size == last.size:
            await self._keep_if_fork(known, signed)
        elif (seen.origin, seen.size, seen.root) not in self._agree:
            pair = (signed, known) if seen.size < last.size else (known, signed)
            if seen.origin in self._witness.last:
                self.compare_later(*pair)
            elif seen.size > last.size:
                self._newest.put(seen.origin, signed)

    def compare_later(self, smaller: Note, larger: Note) -> None:
        """Ask the log whether two of its checkpoints agree; both are verified."""
        if smaller != larger and (smaller, larger) not in self._waiting:
            self._waiting[smaller, larger] = None
            self._tasks.spawn(self._compare(smaller, larger))

    def ask_again(self) -> None:
        """Ask those logs again that did not answer."""
        for smaller, larger in list(self._waiting):
            self._tasks.spawn(self._compare(smaller, larger))

    async def _compare(self, smaller: Note, larger: Note) -> None:
        first, second = checkpoint.read(smaller), checkpoint.read(larger)
        async with self._turns[first.node_id]:
            if (smaller, larger) not in self._waiting:
                return
            question = log_wire.AskConsistency(first.origin, first.size, second.size)
            try:
                answer = await self._questions.ask(first.node_id, question, Consistency)
            except PeeringError as error:
                log.debug("%s proves nothing now: %s", wire.short(first.node_id), error.message)
                return
            self._waiting.pop((smaller, larger), None)
            if isinstance(answer, Declined):
                await self._declined(first, second, answer)
            else:
                await self._judge(smaller, larger, answer)

    async def _judge(self, smaller: Note, larger: Note, answer: Consistency) -> None:
        first, second = checkpoint.read(smaller), checkpoint.read(larger)
        if is_consistent(first.size, first.root, second.size, second.root, answer.proof):
            self._agree[first.origin, first.size, first.root] = None
            self._agree[first.origin, second.size, second.root] = None
            return
        # Of a power of two, a consistency proof leaves the first hash out: it is the root there.
        for proof in (answer.proof, (answer.root, *answer.proof)):
            if await self._keep_if_fork(smaller, larger, proof):
                return
        await self._unproven(first, second)

    async def _declined(self, first: Checkpoint, second: Checkpoint, answer: Declined) -> None:
        if answer.status == 429:
            return
        stated = read_statement(answer.restart)
        if stated is not None and stated.node_id == first.node_id:
            epoch = checkpoint.epoch_of(stated.origin)
            if epoch > checkpoint.epoch_of(first.origin):
                return  # it was given up: what was lost is told when its successor is cosigned
        await self._unproven(first, second)

    async def _unproven(self, first: Checkpoint, second: Checkpoint) -> None:
        detail = (
            f"{first.node_id} does not prove that its checkpoints of {first.size} and "
            f"{second.size} entries are of one history."
        )
        await self._alarms.add("unproven", first.origin, first.node_id, detail)

    async def _keep_if_fork(self, first: Note, second: Note, proof: tuple[bytes, ...] = ()) -> bool:
        found = evidence.fork(first, second, proof)
        if found is not None:
            await self._alarms.add_evidence(found.document)
        return found is not None

    def _known(self, origin: str) -> Note | None:
        if last := self._witness.last.get(origin):
            return note.read(last.note)
        return self._newest.get(origin)

    def _verified(self, notes: Iterable[str]) -> list[tuple[Note, Checkpoint]]:
        """Those that logs of members have signed, and that are not what this box has seen last."""
        found = []
        for text in notes:
            try:
                signed = note.read(text)
                seen = checkpoint.read(signed)
                known = self._known(seen.origin)
                if known is not None and known.text == signed.text:
                    continue  # which is the most, and needs no signature
                if self._is_known(seen.node_id) and checkpoint.is_signed(signed, seen):
                    found.append((checkpoint.without_cosignatures(signed), seen))
            except NoteError as error:
                log.debug("a peer sent a checkpoint that is none: %s", error)
        return found


def _short(text: str) -> str:
    """The note with as many signatures as a message has room for; the log's is the first."""
    if len(text) <= MAX_LINK_NOTE_CHARACTERS:
        return text
    signed = note.read(text)
    return str(Note(signed.text, signed.signatures[:8]))
