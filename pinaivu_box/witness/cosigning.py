"""Has the checkpoints of this box's own log cosigned: by members of the network, and by others that
the configuration names.  A witness that is away, slow or wrong stops nobody: it is asked again
later, and what it signed wrongly is dropped."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Mapping

from pinaivu_box import backoff
from pinaivu_box.errors import PeeringError, StoreError
from pinaivu_box.log import checkpoint, note
from pinaivu_box.log.checkpoint import Checkpoint
from pinaivu_box.log.note import Note, NoteError, NoteKey
from pinaivu_box.receipt_log.service import ReceiptLog
from pinaivu_box.tasks import TaskSet
from pinaivu_box.transport import wire
from pinaivu_box.witness.wire import Cosigned, Declined, SizeConflict, Submit

_ATTEMPTS = 4  # until the old size is that of the witness
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 15.0, 600.0  # after a refusal

log = logging.getLogger("pinaivu.witness")

# Sends a checkpoint to a witness.  Raises PeeringError.
Ask = Callable[[Submit], Awaitable[Cosigned | SizeConflict | Declined]]
NO_KEYS: Mapping[str, NoteKey] = {}


class Cosigning:
    """`cosigned` is the last checkpoint that each witness has cosigned since the start."""

    def __init__(self, own_log: ReceiptLog) -> None:
        self._own_log = own_log
        self.cosigned: dict[str, Checkpoint] = {}
        self._asked: set[str] = set()  # who has not answered yet
        self._refused: dict[str, tuple[int, float]] = {}  # how often, and until when to wait
        self._tasks = TaskSet()

    async def close(self) -> None:
        await self._tasks.cancel()

    async def submit(
        self, witnesses: Mapping[str, Ask], keys: Mapping[str, NoteKey] = NO_KEYS
    ) -> None:
        """Have the newest checkpoint cosigned by these, as far as they have not; nobody waits for
        their answers.  `keys` are those of witnesses that are no boxes."""
        for known in (self.cosigned, self._refused):
            for name in known.keys() - witnesses.keys():
                del known[name]
        signed = await self._own_log.checkpoint()
        newest = checkpoint.read(signed)
        for name, ask in witnesses.items():
            due = newest.size > 0 and self.cosigned.get(name) != newest
            _, waits_until = self._refused.get(name, (0, 0.0))
            if due and name not in self._asked and time.monotonic() >= waits_until:
                self._asked.add(name)
                self._tasks.spawn(self._submit(name, ask, keys.get(name), signed))

    def ask_again(self, name: str) -> None:
        """It is there again, and may have changed its mind."""
        self._refused.pop(name, None)

    def _has_refused(self, name: str, why: str) -> None:
        """It is asked again after a time that doubles, and the operator told once."""
        failures, _ = self._refused.get(name, (0, 0.0))
        level = logging.DEBUG if failures else logging.WARNING
        log.log(level, "%s has not cosigned the log: %s", wire.short(name), why)
        pause = backoff.delay(failures + 1, _FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS)
        self._refused[name] = failures + 1, time.monotonic() + pause

    async def _submit(self, name: str, ask: Ask, key: NoteKey | None, signed: Note) -> None:
        try:
            await self._agree(name, ask, key, signed)
        except PeeringError as error:
            log.debug("%s has not cosigned: %s", wire.short(name), error.message)
        except (StoreError, NoteError) as error:
            log.info("the log has changed while it was cosigned: %s", error)
        except Exception:
            log.exception("%s could not be asked to cosign", wire.short(name))
        finally:
            self._asked.discard(name)

    async def _agree(self, name: str, ask: Ask, key: NoteKey | None, signed: Note) -> None:
        newest = checkpoint.read(signed)
        last = self.cosigned.get(name)
        old = last.size if last and last.origin == newest.origin else 0
        for _ in range(_ATTEMPTS):
            proof = await self._proof(newest, old)
            if proof is None:
                return
            answer = await ask(
                Submit(
                    old,
                    proof,
                    str(checkpoint.without_cosignatures(signed)),
                    self._own_log.statement(),
                )
            )
            if isinstance(answer, Cosigned):
                await self._keep(name, answer.signature, key, signed)
                return
            if isinstance(answer, Declined):
                self._has_refused(name, wire.printable(answer.message))
                return
            if answer.note and (answer.size == 0 or answer.size > newest.size):
                await self._look_at(answer.note)
            old = answer.size

    async def _proof(self, newest: Checkpoint, old: int) -> tuple[bytes, ...] | None:
        """None if there is none any more: the log is another one now, or the witness is ahead."""
        if newest.origin != self._own_log.origin or old > newest.size:
            return None
        if old in (0, newest.size):
            return ()
        return await self._own_log.consistency(old, newest.size)

    async def _keep(self, name: str, lines: str, key: NoteKey | None, signed: Note) -> None:
        found = cosigned_with(key, lines, signed) if key else cosigned_by(name, lines, signed)
        if found is None:
            self._has_refused(name, "what it has sent is not its cosignature")
            return
        self.ask_again(name)
        await self._own_log.add_cosignatures(found, [key] if key else [])
        self.cosigned[name] = checkpoint.read(signed)

    async def _look_at(self, text: str) -> None:
        """A witness has cosigned another log of this box, or more entries than the log has: if it
        can show that this box has signed them, its database is not what it was."""
        try:
            await self._own_log.seen_elsewhere(note.read(text))
        except NoteError as error:
            log.info("a witness names a checkpoint that is not this box's: %s", error)


def cosigned_with(key: NoteKey, lines: str, signed: Note) -> Note | None:
    """The checkpoint with the cosignature by that key that is among these lines, if it is right."""
    try:
        whole = Note(signed.text, note.read_signatures(lines))
    except NoteError:
        return None
    found = checkpoint.cosignature_by(whole, key)
    return note.joined(signed, [found]) if found else None


def cosigned_by(name: str, lines: str, signed: Note) -> Note | None:
    """The checkpoint with the cosignature of the witness that is among these lines, if it is right.
    `name` is a node id; or a URL, then any other box counts: its key is in the name under which it
    signs."""
    try:
        whole = Note(signed.text, note.read_signatures(lines))
        named = checkpoint.witnesses_named(whole)
        others = [one for one in named if one != checkpoint.read(signed).node_id]
        right = [one for one in others if name == one or not name.startswith("node_")]
        if not right or checkpoint.cosignature(whole, right[0]) is None:
            return None
    except NoteError:
        return None
    key = checkpoint.witness_key(right[0])
    return note.joined(signed, [each for each in whole.signatures if each.is_by(key)])
