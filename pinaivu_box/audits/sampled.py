"""Audits what peers served: chooses after the answer, holds it in memory, computes it again in idle
time, and acts on what is found."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Protocol

from msgspec.structs import replace
from prometheus_client import CollectorRegistry, Counter

from pinaivu_box.audits.choice import AuditChoice
from pinaivu_box.audits.finding import Finding, Replay
from pinaivu_box.audits.pending import LegToAudit, PendingAudit, PendingAudits
from pinaivu_box.config import AuditConfig
from pinaivu_box.errors import BoxError, EngineLost
from pinaivu_box.gateway import transcripts
from pinaivu_box.gateway.backend import asked_text
from pinaivu_box.gateway.records import LegRecord, RequestRecord
from pinaivu_box.idle_time import until_idle, while_idle
from pinaivu_box.receipts import commitment
from pinaivu_box.receipts.receipt import Proof
from pinaivu_box.receipts.transcript import decode, encode
from pinaivu_box.store.keys import Key
from pinaivu_box.store.peer_tables import PeerAudits

log = logging.getLogger("pinaivu.audits")

MAX_WAIT_SECONDS = 600.0  # that requests of peers may keep an audit from beginning


class Consequences(Protocol):
    """What follows from a finding."""

    async def keep(self, audits: dict[str, PeerAudits]) -> None:
        """Store what is known of these peers.  Raises sqlite3.Error."""
        ...

    async def failed(self, audit: PendingAudit, leg: LegToAudit, finding: Finding) -> None:
        """It failed, or what the peer signed is disproved."""
        ...

    def evaded(self, audit: PendingAudit) -> None:
        """It could not be audited because of what the peer signed."""
        ...


class SampledAudits:
    """`busy` says whether this box has anything else to do, `busy_for_peers` whether it has for its
    peers, who could keep it so.  `audits` is what is known of each peer, by node id."""

    def __init__(
        self,
        choice: AuditChoice,
        config: Callable[[], AuditConfig],
        replay: Replay,
        busy: Callable[[], bool],
        busy_for_peers: Callable[[], bool],
        consequences: Consequences,
        registry: CollectorRegistry,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.audits: defaultdict[str, PeerAudits] = defaultdict(PeerAudits)
        self.pending = PendingAudits()
        self._choice, self._config = choice, config
        self._replay, self._consequences = replay, consequences
        self._busy, self._busy_for_peers, self._clock = busy, busy_for_peers, clock
        self._wanted = asyncio.Event()
        self._changed: set[str] = set()
        self._results = Counter(
            "pinaivu_audits",
            "Audits of legs that peers served, by result; also what could not be audited.",
            ["result"],
            registry=registry,
        )

    def take(self, record: RequestRecord, key: Key) -> None:
        """A request has its receipt: if a peer served it, decide whether to audit that."""
        if key.policy.audit == "off" or not transcripts.is_auditable(record.job):
            return
        by_peer: dict[str, list[LegRecord]] = defaultdict(list)
        for leg in record.served:
            if leg.proved is not None and isinstance(leg.proved.proof, Proof):
                by_peer[leg.started.node_id].append(leg)
        for peer, legs in by_peer.items():
            known = self.audits[peer]
            self.audits[peer] = replace(known, watched=known.watched + 1)
            self._changed.add(peer)
            if self._choice.is_chosen(record.job.request_id, known, self._config()):
                self._put(peer, legs, record, key)

    def _put(self, peer: str, legs: list[LegRecord], record: RequestRecord, key: Key) -> None:
        transcript = transcripts.transcript_of(record)
        assert transcript is not None  # it has such legs
        audit = PendingAudit(
            peer,
            record.job.request_id,
            encode(transcript),
            tuple(_to_audit(leg) for leg in legs),
            key.transcript_key,
            since=self._clock(),
        )
        if self.pending.add(audit):
            self._wanted.set()
        else:
            self._undecided(audit, "dropped")

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await self._wanted.wait()
            await until_idle(lambda: self._has_to_wait(self.pending.waits_since))
            audit = self.pending.take()
            try:
                await self._audit(audit)
            except Exception:
                log.exception("what the audit of %s has found is not stored", audit.request_id)
            if not self.pending:
                self._wanted.clear()

    def _has_to_wait(self, since: float) -> bool:
        """Whether an audit has to that has waited since then: always for this box's own requests,
        and not for ever for those of peers."""
        overdue = self._clock() - since > MAX_WAIT_SECONDS
        return self._busy() or (not overdue and self._busy_for_peers())

    async def save(self) -> None:
        """Store what has changed of what is known of peers."""
        changed, self._changed = self._changed, set()
        try:
            if changed:
                await self._consequences.keep({peer: self.audits[peer] for peer in changed})
        except sqlite3.Error as error:
            self._changed |= changed
            log.error("what is known of audits was not written: %s", error)

    async def _audit(self, audit: PendingAudit) -> None:
        replaying = self._replay(decode(audit.transcript), audit.legs)
        try:
            found = await while_idle(replaying, lambda: self._has_to_wait(audit.since))
        except EngineLost:  # what the peer signed may have killed it, or the machine has
            log.warning("the engine that audited %s was lost", audit.request_id)
            if not self.pending.again(audit):
                self._undecided(audit, "error", evaded=True)
        except BoxError as error:  # its message may quote the request
            self._undecided(audit, "not_auditable")
            log.info("%s was not audited: %s", audit.request_id, type(error).__name__)
        except Exception as error:
            self._undecided(audit, "error", evaded=True)
            log.error("the audit of %s failed: %r", audit.request_id, type(error))
        else:
            if found is None:
                if not self.pending.again(audit):
                    self._undecided(audit, "interrupted")
                return
            for leg, finding in zip(audit.legs, *found, strict=True):
                await self._conclude(audit, leg, finding)

    def _undecided(self, audit: PendingAudit, result: str, *, evaded: bool = False) -> None:
        """Of a whole request."""
        self._count(result, len(audit.legs))
        self._note_undecided(audit, len(audit.legs), evaded=evaded)

    def _note_undecided(self, audit: PendingAudit, legs: int, *, evaded: bool) -> None:
        known = self.audits[audit.peer]
        self.audits[audit.peer] = replace(known, undecided=known.undecided + legs)
        self._changed.add(audit.peer)
        if evaded:
            self._consequences.evaded(audit)

    async def _conclude(self, audit: PendingAudit, leg: LegToAudit, finding: Finding) -> None:
        self._count(finding.result)
        fields = {
            "request_id": audit.request_id,
            "peer": audit.peer,
            "leg": leg.proof.leg,
            "choice": leg.proof.choice,
            "result": finding.result,
        }
        bad = finding.result in ("failed", "disproved")
        log.log(logging.WARNING if bad else logging.INFO, "audit", extra={"fields": fields})
        if finding.result == "not_auditable":
            self._note_undecided(audit, 1, evaded=finding.evaded)
            return
        known = self.audits[audit.peer]
        self._changed.add(audit.peer)
        if not bad:
            self.audits[audit.peer] = replace(known, agreed=known.agreed + 1)
            return
        self.audits[audit.peer] = replace(
            known,
            watched=0,  # as a newcomer from now on
            failed=known.failed + 1,
            disproved=known.disproved + (finding.result == "disproved"),
        )
        await self._consequences.failed(audit, leg, finding)
        await self.save()

    def _count(self, result: str, legs: int = 1) -> None:
        self._results.labels(result).inc(legs)


def _to_audit(leg: LegRecord) -> LegToAudit:
    proved, job = leg.proved, leg.job
    assert proved is not None and isinstance(proved.proof, Proof)
    _, prompt = commitment.commit(asked_text(job), leg.prompt or [], job.nonce)
    return LegToAudit(proved.proof, proved.signed, prompt, proved.opening)
