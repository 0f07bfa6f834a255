"""Ids that others offered and we lack: one is asked at a time, the next if it does not answer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable

from pinaivu_box.gossip.frames import MAX_IDS

_ANSWER_SECONDS = 3.0
_OTHERS = 32


class _Question:
    __slots__ = ("others", "peer", "until")

    def __init__(self, peer: str, until: float) -> None:
        self.peer, self.until = peer, until
        self.others: list[str] = []


class RecordRequests:
    def __init__(self) -> None:
        self._open: dict[bytes, _Question] = {}
        self._of: Counter[str] = Counter()  # open questions to a peer

    def offered(self, peer: str, number: bytes, now: float) -> bool:
        """Whether to ask that peer now."""
        if question := self._open.get(number):
            if len(question.others) < _OTHERS:
                question.others.append(peer)
            return False
        if self._of[peer] >= MAX_IDS:
            return False
        self._of[peer] += 1
        self._open[number] = _Question(peer, now + _ANSWER_SECONDS)
        return True

    def answered(self, number: bytes) -> Iterable[str]:
        """Who else offered it."""
        question = self._open.pop(number, None)
        if question is None:
            return ()
        self._settle(question.peer)
        return question.others

    def again(self, now: float, linked: Container[str]) -> dict[str, list[bytes]]:
        """Whom to ask now for what others did not give."""
        asked: dict[str, list[bytes]] = {}
        for number, question in list(self._open.items()):
            if question.until > now and question.peer in linked:
                continue
            self.answered(number)
            left = [peer for peer in question.others if peer in linked]
            if left and self.offered(left[0], number, now):
                self._open[number].others = left[1:]
                asked.setdefault(left[0], []).append(number)
        return asked

    def _settle(self, peer: str) -> None:
        self._of[peer] -= 1
        if self._of[peer] <= 0:
            del self._of[peer]
