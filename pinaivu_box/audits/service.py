"""The sampled audits of a box with peers, joined to its reputation, ledger and database."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Mapping

from prometheus_client import CollectorRegistry

from pinaivu_box.audits import disproof as disproofs
from pinaivu_box.audits.choice import AuditChoice
from pinaivu_box.audits.disproof import Disproof
from pinaivu_box.audits.finding import Finding, Replay
from pinaivu_box.audits.pending import LegToAudit, PendingAudit
from pinaivu_box.audits.sampled import SampledAudits
from pinaivu_box.identity import Identity
from pinaivu_box.ledger import disproofs as ledger_disproofs
from pinaivu_box.receipts import transcript_sealing
from pinaivu_box.routing.reputation import Reputation
from pinaivu_box.settings import LiveSettings
from pinaivu_box.store import peer_tables
from pinaivu_box.store.database import Database
from pinaivu_box.store.peer_tables import PeerAudits
from pinaivu_box.store.transcripts import StoredTranscript
from pinaivu_box.tasks import TaskSet
from pinaivu_box.text import utc_text

_SAVE_SECONDS = 60.0


class AuditConsequences:
    """A failed audit lessens the reputation of the peer.  One that disproves what the peer signed
    takes it away, and its evidence is in the ledger."""

    def __init__(self, identity: Identity, database: Database, reputation: Reputation) -> None:
        self._identity, self._database, self._reputation = identity, database, reputation

    async def keep(self, audits: Mapping[str, PeerAudits]) -> None:
        await peer_tables.keep(self._database, audits)

    async def failed(self, audit: PendingAudit, leg: LegToAudit, finding: Finding) -> None:
        if finding.result == "failed":
            why = f"an audit of {audit.request_id} failed"
            self._reputation.disputed(audit.peer, why)
            return
        self._reputation.disproved(
            audit.peer, f"an audit proved its answer to {audit.request_id} false"
        )
        await self._record(audit, leg, finding)

    def evaded(self, audit: PendingAudit) -> None:
        self._reputation.evaded(
            audit.peer, f"its answer to {audit.request_id} could not be audited"
        )

    async def _record(self, audit: PendingAudit, leg: LegToAudit, finding: Finding) -> None:
        proof = leg.proof
        signed, signature = disproofs.sign(
            self._identity,
            Disproof(
                auditor=self._identity.node_id,
                peer=audit.peer,
                request_id=audit.request_id,
                leg=proof.leg,
                choice=proof.choice,
                model_digest=proof.model_digest,
                proof=leg.signed,
                found_at=utc_text(time.time()),
                why=finding.why[:1000],
                report=finding.report,
            ),
        )
        sealed = None
        if audit.sealed_to is not None:  # else nobody could read it but who reads the database
            content = transcript_sealing.seal(audit.transcript, audit.sealed_to)
            sealed = StoredTranscript(content, audit.sealed_to)
        key = (audit.peer, audit.request_id, proof.leg, proof.choice)
        await ledger_disproofs.record(self._database, key, signed, signature, sealed)


class AuditService:
    """`sampled.take` is told of each request that has its receipt.  `busy` and `busy_for_peers` are
    as in `SampledAudits`."""

    def __init__(
        self,
        identity: Identity,
        settings: LiveSettings,
        database: Database,
        reputation: Reputation,
        replay: Replay,
        busy: Callable[[], bool],
        busy_for_peers: Callable[[], bool],
        registry: CollectorRegistry,
    ) -> None:
        self._database = database
        self.sampled = SampledAudits(
            # Of this run of the box only: it is needed nowhere else, so it is stored nowhere.
            AuditChoice(secrets.token_bytes(32)),
            lambda: settings.config.audit,
            replay,
            busy,
            busy_for_peers,
            AuditConsequences(identity, database, reputation),
            registry,
        )

    async def run(self) -> None:
        """Until cancelled: audit, and store what is known of peers within a minute."""
        auditing = TaskSet()
        self.sampled.audits.update(await peer_tables.load(self._database, PeerAudits))
        auditing.spawn(self.sampled.run())
        try:
            while True:
                await asyncio.sleep(_SAVE_SECONDS)
                await self.sampled.save()
        finally:
            await auditing.cancel()
            await self.sampled.save()
