"""What we think of a peer: from what it did for us, never from what others say.

    reputation = reliability x speed x honesty, each from 0 to 1

- reliability: the share of legs that it served to the end, of the latest fifty or so, and of two
  more that everybody is assumed to have served.  A refusal is no failure: a busy box may say so.
- speed: tokens a second that it made, of those that it had promised, on average; 1 if it kept it.
- honesty: halved by every dispute (a proof or tokens that cannot be, or an audit that failed).  A
  proof that an audit has shown to be false counts as ten, an answer that evaded its audit as a
  quarter, until there are two: it may be this box's mistake.

All of it fades: of legs and speed half is forgotten in a week, of disputes in a day.

Of a box that has signed two histories of its log nothing is asked (`forked`): that does not fade,
until an operator dismisses the evidence.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections.abc import Callable, Mapping

from msgspec.structs import replace

from pinaivu_box.store import peer_tables
from pinaivu_box.store.database import Database
from pinaivu_box.store.peer_tables import StoredOpinion

log = logging.getLogger("pinaivu.reputation")

_REMEMBERED_LEGS = 50.0
_PRIOR_SERVED = 2.0  # legs, so that a first failure does not decide
_NEWEST = 0.1  # what the newest leg counts in the average of speeds
_DAY = 86400.0
_WEEK = 7 * _DAY
_SAVE_SECONDS = 60.0
_DISPROVED = 10.0  # disputes
_EVADED, _MAX_FOR_EVADED = 0.25, 2.0
_MAX_DISPUTES = 5.0  # of a peer that is asked at all


class Reputation:
    """`clock` in Unix seconds, which nobody sets while we run; node ids are known once something
    was heard of them.  `changed`: those of whom we think otherwise than was kept."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.opinions: dict[str, StoredOpinion] = {}
        self.changed: set[str] = set()
        # Says that a box has signed two histories of its log, as it goes on after its name.
        self.forked: Callable[[str], str | None] = lambda _node_id: None

    def restore(self, stored: Mapping[str, StoredOpinion]) -> None:
        """What was thought before we started.  What a clock that was ahead has dated fades from now
        on, or it would do so for none of the time that it was ahead."""
        now = self._clock()
        self.opinions = {
            node: replace(opinion, at=min(opinion.at, now)) for node, opinion in stored.items()
        } | self.opinions

    def served(self, node_id: str, promised: float, tokens_per_s: float | None) -> None:
        """A leg came to its end; tokens a second, None if it was too short to say."""
        opinion = self._before_leg(node_id)
        speed = opinion.speed
        if tokens_per_s is not None and promised > 0:
            speed += _NEWEST * (min(1.0, tokens_per_s / promised) - speed)
        self._set(node_id, replace(opinion, served=opinion.served + 1, speed=speed))

    def failed(self, node_id: str, why: str) -> None:
        opinion = self._before_leg(node_id)
        self._set(node_id, replace(opinion, failed=opinion.failed + 1, last=why))

    def disputed(self, node_id: str, why: str) -> None:
        opinion = self._faded(node_id)
        self._set(node_id, replace(opinion, disputes=opinion.disputes + 1, last=why))

    def disproved(self, node_id: str, why: str) -> None:
        """It has signed what is shown to be false."""
        opinion = self._faded(node_id)
        self._set(node_id, replace(opinion, disputes=opinion.disputes + _DISPROVED, last=why))

    def evaded(self, node_id: str, why: str) -> None:
        """An answer could not be audited because of what it has signed.  These alone never keep it
        from being asked."""
        opinion = self._faded(node_id)
        most = max(opinion.disputes, _MAX_FOR_EVADED)
        disputes = min(opinion.disputes + _EVADED, most)
        self._set(node_id, replace(opinion, disputes=disputes, last=why))

    def distrusts(self, node_id: str) -> bool:
        """Whether it is not to be asked, whatever it costs: for a day after it was disproved, or
        after many disputes."""
        return node_id in self.opinions and self._faded(node_id).disputes > _MAX_DISPUTES

    def score(self, node_id: str) -> float:
        if self.forked(node_id):
            return 0.0
        opinion = self._faded(node_id)
        return _reliability(opinion) * opinion.speed * _honesty(opinion)

    def why(self, node_id: str) -> str:
        """In one sentence, for an operator."""
        if why := self.forked(node_id):
            return f"0.00: it {why}"
        if node_id not in self.opinions:
            return "1.00: it has not served anything for us yet"
        opinion = self._faded(node_id)
        sentence = (
            f"{self.score(node_id):.2f}: reliability {_reliability(opinion):.2f} (of the latest, "
            f"{opinion.served:.0f} served and {opinion.failed:.0f} failed), speed "
            f"{opinion.speed:.2f} of what it promised, honesty {_honesty(opinion):.2f} "
            f"({opinion.disputes:.1f} disputes)"
        )
        return f"{sentence}; last trouble: {opinion.last}" if opinion.last else sentence

    def _set(self, node_id: str, opinion: StoredOpinion) -> None:
        self.opinions[node_id] = opinion
        self.changed.add(node_id)

    def _faded(self, node_id: str) -> StoredOpinion:
        """As it is now: part of it is forgotten."""
        opinion, now = self.opinions.get(node_id, StoredOpinion()), self._clock()
        seconds = max(0.0, now - opinion.at)
        left = 0.5 ** (seconds / _WEEK)
        return replace(
            opinion,
            served=opinion.served * left,
            failed=opinion.failed * left,
            speed=1 - (1 - opinion.speed) * left,
            disputes=opinion.disputes * 0.5 ** (seconds / _DAY),
            at=now,
        )

    def _before_leg(self, node_id: str) -> StoredOpinion:
        """With room for another leg."""
        opinion, left = self._faded(node_id), 1 - 1 / _REMEMBERED_LEGS
        return replace(opinion, served=opinion.served * left, failed=opinion.failed * left)


async def load_and_save(reputation: Reputation, database: Database) -> None:
    """Until cancelled: what is thought of peers is on disk within a minute, and at the end."""
    reputation.restore(await peer_tables.load(database, StoredOpinion))
    try:
        while True:
            await asyncio.sleep(_SAVE_SECONDS)
            await _save(reputation, database)
    finally:
        await _save(reputation, database)


async def _save(reputation: Reputation, database: Database) -> None:
    changed, reputation.changed = reputation.changed, set()
    try:
        if changed:
            await peer_tables.keep(database, {peer: reputation.opinions[peer] for peer in changed})
    except sqlite3.Error:
        reputation.changed |= changed
        log.exception("opinions of peers could not be written; they are written again later")


def _reliability(opinion: StoredOpinion) -> float:
    return (opinion.served + _PRIOR_SERVED) / (opinion.served + opinion.failed + _PRIOR_SERVED)


def _honesty(opinion: StoredOpinion) -> float:
    return float(0.5**opinion.disputes)
