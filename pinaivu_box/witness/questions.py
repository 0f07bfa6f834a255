"""Questions to other boxes about logs, over a stream of their link."""

from __future__ import annotations

import time
from random import Random
from typing import TypeVar

from pinaivu_box import backoff
from pinaivu_box.bounded import BoundedDict
from pinaivu_box.errors import PeeringError, PeerRefused, Unreachable
from pinaivu_box.network.network import Network
from pinaivu_box.transport import wire
from pinaivu_box.transport.rpc import MessageStream, UnexpectedMessage
from pinaivu_box.witness import wire as log_wire
from pinaivu_box.witness.wire import Answer, Declined, Question

ANSWER_SECONDS = 20.0
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 5.0, 600.0
_MAX_REMEMBERED = 4096

T = TypeVar("T")


class AskedToWait(Unreachable):
    """The box has failed before, and is left alone for some time."""


class Questions:
    """Asks; a box that fails, or does not know the purpose, is left alone for a time that
    doubles."""

    def __init__(self, network: Network, random: Random | None = None) -> None:
        self._network = network
        self._random = random or Random()  # noqa: S311, it only spreads questions
        self._failures: BoundedDict[str, tuple[int, float]] = BoundedDict(_MAX_REMEMBERED)

    async def ask(
        self, peer: str, question: Question, kind: type[T] | tuple[type[T], ...]
    ) -> T | Declined:
        """The answer of a member.  Raises PeeringError."""
        failures, until = self._failures.get(peer, (0, 0.0))
        if time.monotonic() < until:
            raise AskedToWait(f"{wire.short(peer)} has failed, and is asked again later.")
        try:
            answer = await self._ask(peer, question, kind)
        except PeeringError as error:
            longest = _LONGEST_PAUSE_SECONDS
            unknown = isinstance(error, PeerRefused) and error.code == wire.Code.VERSION
            first = longest if unknown else _FIRST_PAUSE_SECONDS
            pause = backoff.delay(failures + 1, first, longest, self._random)
            self._failures[peer] = failures + 1, time.monotonic() + pause
            raise
        self._failures.pop(peer, None)
        return answer

    def is_back(self, peer: str) -> None:
        """There is a link to it again: it may be another version."""
        self._failures.pop(peer, None)

    async def _ask(
        self, peer: str, question: Question, kind: type[T] | tuple[type[T], ...]
    ) -> T | Declined:
        stream = await self._network.open(peer, log_wire.PURPOSE)
        conversation: MessageStream[Question, Answer] = MessageStream(
            peer, stream, log_wire.answers, receive_seconds=ANSWER_SECONDS, max_messages=1
        )
        try:
            async with conversation:
                await conversation.send(question)
                answer = await conversation.receive()
        except TimeoutError:
            raise Unreachable(f"{wire.short(peer)} did not answer about a log.") from None
        if isinstance(answer, Declined):
            return answer
        if not isinstance(answer, kind):
            raise UnexpectedMessage(f"{wire.short(peer)} did not answer what it was asked.")
        return answer
