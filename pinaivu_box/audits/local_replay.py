"""Computes legs of peers again with an engine of its own on this box, for sampled audits."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from pinaivu_box.audits.auditor import audit_legs
from pinaivu_box.audits.finding import Finding, Result
from pinaivu_box.audits.own_engine import Digest, NotHere, engine_for, model_of
from pinaivu_box.audits.pending import LegToAudit
from pinaivu_box.audits.prompts import other_prompts
from pinaivu_box.receipts.audit import LegAudit
from pinaivu_box.receipts.transcript import RequestTranscript
from pinaivu_box.settings import LiveSettings


class LocalReplay:
    """A `finding.Replay`.  `digest` and `known` are as in `own_engine.model_of`."""

    def __init__(self, settings: LiveSettings, digest: Digest, known: Digest) -> None:
        self._settings, self._digest, self._known = settings, digest, known

    async def __call__(
        self, transcript: RequestTranscript, legs: Sequence[LegToAudit]
    ) -> list[Finding]:
        config, catalog = self._settings.config, self._settings.catalog
        proofs = [leg.proof for leg in legs]
        try:
            # All legs of a request that boxes serve are of one file.
            model = await model_of(catalog, proofs[0], self._digest, self._known)
            async with engine_for(config, model, self._digest, transcript, proofs) as engine:
                audits = await audit_legs(engine, transcript, legs)
                # With a template of its own this box cannot say what others make of a chat.
                others = (
                    set() if model.settings.template else await other_prompts(engine, transcript)
                )
        except (NotHere, OSError) as error:
            return [Finding("not_auditable", str(error)) for _ in legs]
        pairs = zip(legs, audits, strict=True)
        return [finding_of(audit, leg.proof.prompt in others) for leg, audit in pairs]


def finding_of(audit: LegAudit, other_prompt: bool) -> Finding:
    """What an audit means for a peer: in bitwise mode a difference is proof.  Another prompt than
    was asked is none, since templates can be configured."""
    result: Result
    if audit.verdict == "agrees" and other_prompt:
        return Finding("failed", "its prompt is not what this box makes of the request")
    if audit.verdict == "agrees":
        result = "agreed"
    elif audit.verdict == "not auditable":
        result = "not_auditable"
    else:
        result = "disproved" if audit.mode == "bitwise" else "failed"
    return Finding(result, audit.meaning, msgspec.to_builtins(audit))
