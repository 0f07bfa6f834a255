"""Answers what other members ask about logs, over streams of their links."""

from __future__ import annotations

import logging
import time

from pinaivu_box.bounded import BoundedDict
from pinaivu_box.errors import InvalidValue, LinkLost, StoreError
from pinaivu_box.gossip.adverts import TokenBucket
from pinaivu_box.log import checkpoint, note
from pinaivu_box.log.note import NoteError
from pinaivu_box.receipt_log.service import ReceiptLog
from pinaivu_box.transport import wire
from pinaivu_box.transport.link import Stream
from pinaivu_box.transport.rpc import MessageStream
from pinaivu_box.witness import wire as log_wire
from pinaivu_box.witness.comparison import LogComparison
from pinaivu_box.witness.rules import Rejected, Submission
from pinaivu_box.witness.wire import Answer, Declined, Question
from pinaivu_box.witness.witness import NoStatement, Witness

MAX_QUESTIONS = 16  # on a stream
IDLE_SECONDS = 20.0
_BURST, _PER_SECOND = 60.0, 2.0  # questions of a peer
_MAX_REASON_CHARACTERS = 500
_MAX_PEERS = 4096

log = logging.getLogger("pinaivu.witness")


class LogServer:
    """Serves the purpose `log`."""

    def __init__(self, witness: Witness, comparison: LogComparison, own_log: ReceiptLog) -> None:
        self._witness, self._comparison, self._own_log = witness, comparison, own_log
        self._limits: BoundedDict[str, TokenBucket] = BoundedDict(_MAX_PEERS)

    async def serve(self, peer: str, stream: Stream) -> None:
        """Serve one stream.  Raises ProtocolError if the peer sends what no box sends."""
        conversation: MessageStream[Answer, Question] = MessageStream(
            peer,
            stream,
            log_wire.questions,
            receive_seconds=IDLE_SECONDS,
            max_messages=MAX_QUESTIONS,
        )
        try:
            async with conversation:
                while (question := await conversation.receive()) is not None:
                    await conversation.send(await self._answer(peer, question))
        except (LinkLost, TimeoutError) as error:
            log.debug("a stream of %s about logs ended: %s", wire.short(peer), error)

    async def _answer(self, peer: str, question: Question) -> Answer:
        limit = self._limits.get(peer)
        if limit is None:
            limit = self._limits[peer] = TokenBucket(_BURST)
        if not limit.take(_PER_SECOND, time.monotonic()):
            return Declined(429, "This box answers fewer questions about logs: ask later.")
        match question:
            case log_wire.Submit():
                return await self._cosign(peer, question)
            case log_wire.AskConsistency():
                return await self._prove(question)
            case log_wire.AskKnown():
                return log_wire.Known(self._comparison.known_of(question.node))
            case log_wire.Compare():
                return await self._comparison.answer(question)
            case log_wire.GiveEvidence():
                await self._comparison.learn_evidence(question.evidence)
                return log_wire.Thanks()

    async def _cosign(self, peer: str, asked: log_wire.Submit) -> Answer:
        try:
            submission = Submission(asked.old, asked.proof, note.read(asked.note))
            origin = checkpoint.read(submission.note).origin
            if checkpoint.node_of(origin) != peer:
                return Declined(403, "It is the log of another box.")
        except NoteError as error:
            return _declined(400, f"It cannot be read: {error}.")
        try:
            cosignature = await self._witness.add_checkpoint(submission, asked.restart, by_log=True)
        except Rejected as rejected:
            last = self._witness.last.get(origin)
            if rejected.status == 422 and last is not None:
                await self._comparison.learn([asked.note])  # has the log prove what it can
            if isinstance(rejected, NoStatement):
                return log_wire.SizeConflict(0, rejected.former)
            if rejected.status == 409:
                return log_wire.SizeConflict(rejected.size, last.note if last else "")
            return _declined(rejected.status, rejected.why)
        return log_wire.Cosigned(cosignature.line)

    async def _prove(self, asked: log_wire.AskConsistency) -> Answer:
        try:
            if not 0 < asked.old <= asked.new:
                raise InvalidValue("not a range of sizes", field="old")
            root, proof = await self._own_log.growth(asked.origin, asked.old, asked.new)
        except StoreError:
            why = "This box does not have the log, or not so many entries of it."
            return Declined(404, why, self._own_log.statement())
        return log_wire.Consistency(root, proof)


def _declined(status: int, why: str) -> Declined:
    return Declined(status, why[:_MAX_REASON_CHARACTERS])
