"""The load of boxes at this moment, as they report it over the links that they have anyway.

An advert is older the larger the network is.  So each box reports to its neighbours every request
that begins or ends there, and a box that is about to send a request away asks its neighbours what
they know of theirs: with ten links each that is a hundred boxes, a round trip old.

What a box reports of itself is valid while its link exists.  What it reports of others is a hint:
it is accepted only if it was asked for, and forgotten after `REPORT_SECONDS`: a false report costs
one attempt.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

from pinaivu_box.bounded import BoundedDict
from pinaivu_box.changes import Changes
from pinaivu_box.gossip.adverts import ModelLoad, Offer, TokenBucket
from pinaivu_box.gossip.frames import MAX_LOADS, LoadQuery, LoadReport, LoadUpdate
from pinaivu_box.membership.records import key_of, node_of

REPORT_SECONDS = 2.0
_UPDATE_BURST, _UPDATES_PER_SECOND = 8.0, 4.0  # to each link


class ReportedLoad(NamedTuple):
    """`at`: when it was received, on our monotonic clock, in seconds."""

    load: ModelLoad
    at: float


class Loads:
    """What this box knows of the load of others; `reports` are the answers of neighbours."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.reports = Changes()
        self._clock = clock
        self._own: dict[str, ModelLoad] = {}
        self._updates = TokenBucket(_UPDATE_BURST)
        self._neighbours: dict[str, BoundedDict[str, ReportedLoad]] = {}  # by model
        self._others: dict[str, dict[str, ReportedLoad]] = {}  # by model
        self._unanswered: dict[str, set[str]] = {}  # neighbours that have not answered, by model

    def link_up(self, peer: str) -> LoadUpdate | None:
        """Take up a neighbour that understands these frames.  Returns what it has to be sent first,
        None if it has been sent."""
        if peer in self._neighbours:
            return None
        self._neighbours[peer] = BoundedDict(MAX_LOADS)
        return LoadUpdate(tuple(self._own.items()))

    def link_down(self, peer: str) -> None:
        """Forget a neighbour."""
        self._neighbours.pop(peer, None)
        for peers in self._unanswered.values():
            peers.discard(peer)

    def update(self, offers: Sequence[Offer]) -> LoadUpdate | None:
        """Take over our own load.  Returns what all `neighbours` have to be sent now; None if
        nothing has changed, or if it must wait."""
        loads = {offer.id: offer.load for offer in offers}
        changed = {
            model: load
            for model, load in loads.items()
            if (before := self._own.get(model)) is None or _gist(before) != _gist(load)
        }
        if not changed or not self._updates.take(_UPDATES_PER_SECOND, self._clock()):
            return None
        self._own = loads
        return LoadUpdate(tuple(changed.items()))

    @property
    def neighbours(self) -> Collection[str]:
        return self._neighbours.keys()

    def query(self, model: str) -> LoadQuery:
        """Return the query for all `neighbours`, and wait for their answers from now on."""
        oldest = self._clock() - REPORT_SECONDS
        for node, loads in list(self._others.items()):
            if all(reported.at < oldest for reported in loads.values()):
                del self._others[node]
        self._unanswered[model] = set(self._neighbours)
        return LoadQuery(model)

    def waiting(self, model: str) -> bool:
        """Whether more than a quarter of the neighbours that were asked have not answered."""
        return 4 * len(self._unanswered.get(model, ())) > len(self._neighbours)

    def receive(self, peer: str, frame: LoadUpdate | LoadQuery | LoadReport) -> LoadReport | None:
        """Take over a neighbour's frame, and return the answer, if it needs one."""
        now = self._clock()
        if isinstance(frame, LoadUpdate):
            if (loads := self._neighbours.get(peer)) is not None:
                for model, load in frame.models:
                    loads[model] = ReportedLoad(load, now)
        elif isinstance(frame, LoadQuery):
            return self._answer(peer, frame.model)
        elif peer in self._unanswered.get(frame.model, ()):
            self._unanswered[frame.model].discard(peer)
            for key, load in frame.boxes:
                self._others.setdefault(node_of(key), {})[frame.model] = ReportedLoad(load, now)
            self.reports.notify()
        return None

    def _answer(self, peer: str, model: str) -> LoadReport:
        boxes = [
            (key_of(node), loads[model].load)
            for node, loads in self._neighbours.items()
            if model in loads and node != peer
        ]
        return LoadReport(model, tuple(boxes[:MAX_LOADS]))

    def of(self, node_id: str) -> Mapping[str, ReportedLoad]:
        """Return the loads of a box by model, as far as they are known now: as it reported them
        itself, or else as others did."""
        if (own := self._neighbours.get(node_id)) is not None:
            return own
        oldest, loads = self._clock() - REPORT_SECONDS, self._others.get(node_id, {})
        return {model: reported for model, reported in loads.items() if reported.at >= oldest}


def _gist(load: ModelLoad) -> tuple[int, int, int]:
    """Return what is worth an update when it changes: all but small changes of the cache."""
    return load.sequences_free, load.queue, load.kv_free.bit_length()
