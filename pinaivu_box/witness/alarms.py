"""What is wrong with the logs of others: kept, told to the operator, counted."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from pinaivu_box.log import evidence
from pinaivu_box.store import witnessed
from pinaivu_box.store.database import Database
from pinaivu_box.store.times import now_ms
from pinaivu_box.store.witnessed import Alarm, AlarmKind

log = logging.getLogger("pinaivu.witness")

FORKED = "has signed two histories of its log"


class Alarms:
    """All alarms of this box, by id; `changed` is called with a new one."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self.all: dict[str, Alarm] = {}
        self.forks_found = 0  # since the start
        self.changed: Callable[[Alarm], None] = lambda _alarm: None

    async def open(self) -> None:
        self.all = {alarm.id: alarm for alarm in await witnessed.alarms(self._database)}

    def forked(self, node_id: str) -> bool:
        """Whether a box has signed two histories, which is proven."""
        of = self.counting(node_id)
        return any(each.kind == "fork" for each in of)

    def why_distrusted(self, node_id: str) -> str | None:
        """Why nothing is asked of a box, as it goes on after its name; else None."""
        return FORKED if self.forked(node_id) else None

    def counting(self, node_id: str) -> list[Alarm]:
        """Of a box, without logs that an operator has dismissed."""
        of = [each for each in self.all.values() if each.node_id == node_id]
        dismissed = {each.origin for each in of if each.dismissed}
        return [each for each in of if each.origin not in dismissed]

    def documents(self) -> dict[str, bytes]:
        """Evidence that proves itself, by id."""
        return {each.id: each.document for each in self.all.values() if each.kind == "fork"}

    async def add_evidence(self, document: bytes) -> None:
        """Keep evidence of a fork, whoever brings it, and nothing that came with it.  Raises
        NoteError if it proves none."""
        document = evidence.normalised(document)
        first, second = evidence.read(document)
        detail = (
            f"{first.node_id} {FORKED}: it has signed checkpoints of {first.size} and "
            f"{second.size} entries that do not agree."
        )
        await self._add("fork", first.origin, first.node_id, detail, document)

    async def add(self, kind: AlarmKind, origin: str, node_id: str, detail: str) -> None:
        """Keep an alarm that proves nothing to others; `detail` is a sentence."""
        await self._add(kind, origin, node_id, detail, b"")

    async def _add(
        self, kind: AlarmKind, origin: str, node_id: str, detail: str, document: bytes
    ) -> None:
        key = (
            evidence.id_of(document)
            if document
            else hashlib.sha256(f"{kind}\n{origin}\n{detail}".encode()).hexdigest()[:32]
        )
        alarm = Alarm(key, kind, node_id, origin, now_ms(), detail, document)
        if key in self.all or not await witnessed.add_alarm(self._database, alarm):
            return
        self.all[key] = alarm
        self.forks_found += kind == "fork"
        level = logging.ERROR if kind in witnessed.LOUD else logging.WARNING
        fields = {"node_id": node_id, "origin": origin, "evidence": key}
        log.log(level, "the log of another box: %s", detail, extra={"fields": fields})
        self.changed(alarm)


class ForkMetrics(Collector):
    """Read when scraped."""

    def __init__(self, alarms: Alarms) -> None:
        self._alarms = alarms

    def collect(self) -> Iterator[Metric]:
        yield CounterMetricFamily(
            "pinaivu_log_forks",
            "Proven forks of other boxes' logs that were found since the start.",
            value=self._alarms.forks_found,
        )
        family = GaugeMetricFamily(
            "pinaivu_log_alarms", "Alarms about other boxes' logs that are kept.", labels=["kind"]
        )
        for kind in ("fork", "unproven", "no-statement", "restart"):
            count = sum(each.kind == kind for each in self._alarms.all.values())
            family.add_metric([kind], count)
        yield family
