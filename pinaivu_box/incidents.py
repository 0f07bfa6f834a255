"""What goes wrong on this box, noted as it happens: engines that die, peers that are lost, minutes
in which more than one request in a hundred was answered with 503.  And when the box ran, and what
it saw of its peers meanwhile."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from msgspec import Struct
from msgspec.structs import replace
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from pinaivu_box.store import incidents, peers
from pinaivu_box.store.database import Database
from pinaivu_box.store.incidents import Incident, Kind, Run
from pinaivu_box.store.times import now_ms
from pinaivu_box.tasks import TaskSet

log = logging.getLogger("pinaivu.incidents")

_MINUTE_SECONDS = 60.0
_MAX_SHARE = 0.01  # of requests that are answered with 503
_MAX_LOST = 1000  # peers; no network is larger, whatever members say
_MAX_UNSAVED = 1000  # while the database cannot be written
DAY_MS = 86_400_000
DAYS = 90  # of uptime that are told


class Incidents:
    """Notes incidents from `open` to `close`.

    `is_back` says whether a peer that was lost at that time of the monotonic clock is there again,
    or is no peer any more.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self.is_back: Callable[[str, float], bool] = lambda _peer, _lost_at: False
        self.counts: dict[Kind, int] = {"engine": 0, "peer": 0, "errors": 0}  # since the start
        self._lost: dict[str, tuple[Incident, float]] = {}  # by node id
        self._errors: Incident | None = None  # that goes on
        self._worst = 0.0  # share of 503 in a minute of it
        self._answered = self._unavailable = 0  # in this minute
        self._began = self._minute_began = now_ms()
        self._run_is_known = False
        self._unsaved: dict[str, Incident] = {}
        self._saving: asyncio.Task[None] | None = None
        self._uptime: Uptime | None = None  # as it was found at `_uptime_at`
        self._uptime_at = 0.0
        self._uptime_lock = asyncio.Lock()
        self._tasks = TaskSet()

    @property
    def open_count(self) -> int:
        return len(self._lost) + (self._errors is not None)

    async def open(self) -> None:
        await self._note_run()
        self._tasks.spawn(self._watch())

    async def close(self) -> None:
        await self.settled()
        await self._tasks.cancel()
        await self._note_run()

    def answered(self, status: int) -> None:
        """A request for inference was answered with this status."""
        self._answered += 1
        self._unavailable += status == 503

    def engine_died(self, model_id: str) -> None:
        now = now_ms()
        self._begin("engine", model_id, "The engine died.", now, now)

    def peer_lost(self, node_id: str) -> None:
        if node_id not in self._lost and len(self._lost) < _MAX_LOST:
            incident = self._begin("peer", node_id, "The link to it was lost.", now_ms())
            self._lost[node_id] = incident, time.monotonic()

    def peer_is_back(self, node_id: str) -> None:
        if found := self._lost.pop(node_id, None):
            self._save(replace(found[0], ended_at=max(now_ms(), found[0].began_at)))

    async def uptime(self) -> Uptime:
        """Of the last 90 days, until now, or until some time in the last minute: it is computed at
        most once a minute, however many ask."""
        async with self._uptime_lock:
            if self._uptime is None or time.monotonic() - self._uptime_at >= _MINUTE_SECONDS:
                self._uptime = await self._compute_uptime()
                self._uptime_at = time.monotonic()
            return self._uptime

    async def minute_is_over(self) -> None:
        """Judge the answers of this minute, look for the peers that were lost, and note that the
        box runs."""
        began, self._minute_began = self._minute_began, now_ms()
        answered, self._answered = self._answered, 0
        unavailable, self._unavailable = self._unavailable, 0
        self._judge(answered, unavailable, began)
        for node_id, (_, lost_at) in list(self._lost.items()):
            if self.is_back(node_id, lost_at):
                self.peer_is_back(node_id)
        self._save()
        await self._note_run()

    async def settled(self) -> None:
        """Return once what was noted was written, or could not be."""
        if self._saving is not None:
            await asyncio.wait([self._saving])

    def _judge(self, answered: int, unavailable: int, began: int) -> None:
        """Minutes in a row with too many 503 are one incident, which tells of the worst."""
        if unavailable > _MAX_SHARE * answered:
            detail = f"{unavailable} of {answered} requests in a minute were answered with 503."
            share = unavailable / answered
            if self._errors is None:
                self._errors = self._begin("errors", "", detail, began)
                self._worst = share
            elif share > self._worst:
                self._errors, self._worst = replace(self._errors, detail=detail), share
                self._save(self._errors)
        elif self._errors is not None:
            self._save(replace(self._errors, ended_at=max(began, self._errors.began_at)))
            self._errors = None

    async def _compute_uptime(self) -> Uptime:
        runs, now = await incidents.runs(self._database), now_ms()
        if runs:  # of which the last one is this
            runs[-1] = Run(runs[-1].began_at, max(runs[-1].seen_at, now))
        losses = await incidents.losses(self._database, now - DAYS * DAY_MS)
        first_links = await peers.first_links(self._database)

        def compute() -> Uptime:
            return Uptime(
                uptime(runs, now, DAYS), uptime_of_peers(runs, losses, first_links, now, DAYS)
            )

        return await asyncio.to_thread(compute)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(_MINUTE_SECONDS)
            try:
                await self.minute_is_over()
            except Exception:
                log.exception("this minute's incidents could not be noted")

    async def _note_run(self) -> None:
        """A box runs also where nothing can be written; then less is known of its uptime."""
        try:
            if self._run_is_known:
                await incidents.still_running(self._database, now_ms())
            else:
                await incidents.begin_run(self._database, self._began)
                self._run_is_known = True
        except sqlite3.Error as error:
            log.warning("it could not be noted that the box runs: %s", error)

    def _begin(
        self, kind: Kind, subject: str, detail: str, began_at: int, ended_at: int | None = None
    ) -> Incident:
        self.counts[kind] += 1
        incident = Incident(incidents.new_id(), kind, subject, began_at, ended_at, detail)
        self._save(incident)
        return incident

    def _save(self, *changed: Incident) -> None:
        """Write these and what could not be written before."""
        for incident in changed:
            if incident.id in self._unsaved or len(self._unsaved) < _MAX_UNSAVED:
                self._unsaved[incident.id] = incident
        if self._unsaved and self._saving is None:
            self._saving = self._tasks.spawn(self._write())

    async def _write(self) -> None:
        """One after another, for a later state must not be overwritten by an earlier one."""
        try:
            while batch := self._unsaved:
                self._unsaved = {}
                try:
                    await incidents.save(self._database, batch.values())
                except Exception:
                    self._unsaved = {**batch, **self._unsaved}
                    log.exception("incidents could not be written, the next minute tries again")
                    return
        finally:
            self._saving = None


class IncidentMetrics(Collector):
    """Read when scraped."""

    def __init__(self, noted: Incidents) -> None:
        self._noted = noted

    def collect(self) -> Iterator[Metric]:
        family = CounterMetricFamily(
            "pinaivu_incidents",
            "Engines that died, peers that were lost, times with more than 1 % of 503.",
            labels=["kind"],
        )
        for kind, count in self._noted.counts.items():
            family.add_metric([kind], count)
        yield family
        yield GaugeMetricFamily(
            "pinaivu_incidents_open", "Incidents that go on.", value=self._noted.open_count
        )


class DayOfUptime(Struct, frozen=True):
    """A day in UTC, which began at `began_at` (Unix milliseconds): of its `known` seconds the box
    ran in `running`."""

    began_at: int
    known: int
    running: int


class PeerUptime(Struct, frozen=True):
    """What this box saw of a peer: of the `known` seconds in which it ran itself, from `since`
    (Unix milliseconds) on, it was without the peer in all but `up`."""

    since: int
    known: int
    up: int


class Uptime(Struct, frozen=True):
    """`peers` by node id: those with which this box has had a link."""

    days: list[DayOfUptime]
    peers: dict[str, PeerUptime]


def uptime(runs: Sequence[Run], now: int, days: int) -> list[DayOfUptime]:
    """The last days, the oldest first, from the first run that is known up to now."""
    today = now - now % DAY_MS
    oldest = at = today - (days - 1) * DAY_MS
    first = min((run.began_at for run in runs), default=now)
    running = dict.fromkeys(range(oldest, today + 1, DAY_MS), 0)
    for run in sorted(runs, key=lambda run: run.began_at):
        at = max(at, run.began_at)  # a clock that was set back: they overlap
        while at < (end := min(run.seen_at, now)):
            day = at - at % DAY_MS
            running[day] += min(end, day + DAY_MS) - at
            at = min(end, day + DAY_MS)
    found = []
    for day, milliseconds in running.items():
        begin, end = max(day, first), min(day + DAY_MS, now)
        if begin < end:
            found.append(DayOfUptime(day, (end - begin) // 1000, milliseconds // 1000))
    return found


def uptime_of_peers(
    runs: Sequence[Run],
    losses: Iterable[Incident],
    first_links: Mapping[str, int],
    now: int,
    days: int,
) -> dict[str, PeerUptime]:
    """Of the last days, from the first link with a peer up to now, without the times in which this
    box did not run: then it could lose nobody.  `losses` are incidents, the oldest first."""
    oldest = now - now % DAY_MS - (days - 1) * DAY_MS
    begins: list[int] = []  # of times that do not overlap
    ends: list[int] = []
    ran_before = [0]
    for run in sorted(runs, key=lambda run: run.began_at):
        begin, end = max(run.began_at, ends[-1] if ends else 0), min(run.seen_at, now)
        if begin < end:
            begins.append(begin)
            ends.append(end)
            ran_before.append(ran_before[-1] + end - begin)

    def ran_until(at: int) -> int:
        number = bisect_right(begins, at)
        if not number:
            return 0
        return ran_before[number - 1] + min(at, ends[number - 1]) - begins[number - 1]

    lost: dict[str, list[Incident]] = {}
    for loss in losses:
        lost.setdefault(loss.subject, []).append(loss)
    found = {}
    for node_id, first in first_links.items():
        since = at = max(oldest, first)
        known, missed = ran_until(now) - ran_until(since), 0
        for loss in lost.get(node_id, ()):
            at = max(at, loss.began_at)  # a clock that was set back: they overlap
            end = min(now, now if loss.ended_at is None else loss.ended_at)
            missed += max(0, ran_until(end) - ran_until(at))
            at = max(at, end)
        if known > 0:
            found[node_id] = PeerUptime(since, known // 1000, (known - missed) // 1000)
    return found
