"""How busy boxes are at this moment, as they tell each other over the links that they have anyway.

An advert is as old as the network is large.  So each box tells those that it is linked with of
every request that begins or ends there, and whoever is about to send one away asks them what they
know of each other: with ten links each that is a hundred boxes, a round trip old.

What a box says of itself counts while its link stands.  What it says of others is a hint: it is
heard only if it was asked for, and forgotten after `TOLD_SECONDS`, so that a lie costs a try.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

from pinaivu_box.gossip.adverts import Offer, TokenBucket
from pinaivu_box.gossip.frames import MAX_TOLD, LoadQuery, LoadReport, LoadUpdate, ModelLoad
from pinaivu_box.membership.records import key_of, node_of

TOLD_SECONDS = 2.0
_BURST, _PER_SECOND = 8.0, 4.0  # Busy frames to each link


class ReportedLoad(NamedTuple):
    """`at`: when, on our monotonic clock, seconds."""

    load: ModelLoad
    at: float


class Loads:
    def __init__(self, clock: Callable[[], float]) -> None:
        self.answered: Callable[[], None] = lambda: None  # called when somebody has
        self._clock = clock
        self._own: dict[str, ModelLoad] = {}
        self._speech = TokenBucket(_BURST)
        self._linked: dict[str, dict[str, ReportedLoad]] = {}
        self._told: dict[str, dict[str, ReportedLoad]] = {}
        self._asked: dict[str, set[str]] = {}  # who has not answered, by model

    def linked(self, peer: str) -> LoadUpdate | None:
        """It understands us, and hears this first; None if it has."""
        if peer in self._linked:
            return None
        self._linked[peer] = {}
        return LoadUpdate(tuple(self._own.items()))

    def ended(self, peer: str) -> None:
        self._linked.pop(peer, None)
        for silent in self._asked.values():
            silent.discard(peer)

    def changed(self, offers: Sequence[Offer]) -> LoadUpdate | None:
        """What is to be told to all `listeners` now; None if nothing, or if it must wait."""
        now = {one.id: ModelLoad(one.sequences_free, one.kv_free, one.queue) for one in offers}
        new = {
            model: load
            for model, load in now.items()
            if (was := self._own.get(model)) is None or _gist(was) != _gist(load)
        }
        if not new or not self._speech.take(_PER_SECOND, self._clock()):
            return None
        self._own = now
        return LoadUpdate(tuple(new.items()))

    @property
    def listeners(self) -> Collection[str]:
        return self._linked.keys()

    def ask(self, model: str) -> LoadQuery:
        """For all `listeners`."""
        old = self._clock() - TOLD_SECONDS
        for node, told in list(self._told.items()):
            if all(heard.at < old for heard in told.values()):
                del self._told[node]
        self._asked[model] = set(self._linked)
        return LoadQuery(model)

    def waiting(self, model: str) -> bool:
        """Whether more than a quarter of those that were asked have not answered."""
        return 4 * len(self._asked.get(model, ())) > len(self._linked)

    def hear(self, peer: str, said: LoadUpdate | LoadQuery | LoadReport) -> LoadReport | None:
        """The answer, if it wants one."""
        now = self._clock()
        if isinstance(said, LoadUpdate):
            if (heard := self._linked.get(peer)) is not None:
                heard |= {model: ReportedLoad(load, now) for model, load in said.models}
                while len(heard) > MAX_TOLD:
                    del heard[next(iter(heard))]
        elif isinstance(said, LoadQuery):
            return self._answer(peer, said.model)
        elif peer in self._asked.get(said.model, ()):
            self._asked[said.model].discard(peer)
            for key, load in said.boxes:
                self._told.setdefault(node_of(key), {})[said.model] = ReportedLoad(load, now)
            self.answered()
        return None

    def _answer(self, peer: str, model: str) -> LoadReport:
        found = [
            (key_of(node), loads[model].load)
            for node, loads in self._linked.items()
            if model in loads and node != peer
        ]
        return LoadReport(model, tuple(found[:MAX_TOLD]))

    def of(self, node_id: str) -> Mapping[str, ReportedLoad]:
        """By model, as far as it is known now: by its own word, else by that of others."""
        if (own := self._linked.get(node_id)) is not None:
            return own
        old, told = self._clock() - TOLD_SECONDS, self._told.get(node_id, {})
        return {model: heard for model, heard in told.items() if heard.at >= old}


def _gist(load: ModelLoad) -> tuple[int, int, int]:
    """What is worth telling: all but small moves of the cache."""
    return load.sequences_free, load.queue, load.kv_free.bit_length()
