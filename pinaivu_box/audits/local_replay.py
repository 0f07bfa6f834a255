"""Computes legs of peers again with an engine of its own on this box, for sampled audits."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager

import msgspec

from pinaivu_box.audits.auditor import audit_legs
from pinaivu_box.audits.finding import Finding, Result
from pinaivu_box.audits.own_engine import Digest, NotHere, contexts_of, engine_for, model_of
from pinaivu_box.audits.pending import LegToAudit
from pinaivu_box.audits.prompts import other_prompts
from pinaivu_box.config import Config
from pinaivu_box.gateway.engine_process import EngineProcess
from pinaivu_box.models.catalog import Model
from pinaivu_box.receipts.audit import LegAudit, not_auditable, without_tokens
from pinaivu_box.receipts.receipt import Proof
from pinaivu_box.receipts.transcript import RequestTranscript
from pinaivu_box.settings import LiveSettings

OTHER_PROMPT = "its prompt is not what this box makes of the request"


MAX_SIZES = 4  # of engines for one request; a box has one, or a second one after a reload


class LocalReplay:
    """A `finding.Replay`.  `digest` and `known` are as in `own_engine.model_of`."""

    def __init__(self, settings: LiveSettings, digest: Digest, known: Digest) -> None:
        self._settings, self._digest, self._known = settings, digest, known

    async def __call__(
        self, transcript: RequestTranscript, legs: Sequence[LegToAudit]
    ) -> list[Finding]:
        try:
            # All legs of a request that boxes serve are of one file.
            proof = legs[0].proof
            model = await model_of(self._settings.catalog, proof, self._digest, self._known)
        except (NotHere, OSError) as error:
            return [Finding("not_auditable", str(error)) for _ in legs]
        return await _Comparison(self._settings.config, model, self._digest, transcript).of(legs)


class _Comparison:
    """Of one request.  A peer chooses the context that its proofs need, up to more than there is
    room for.  So what takes none is compared first: the prompts."""

    def __init__(
        self, config: Config, model: Model, digest: Digest, transcript: RequestTranscript
    ) -> None:
        self._config, self._model, self._digest = config, model, digest
        self._transcript = transcript
        self._others: set[int] | None = None  # prompts, once they were compared

    async def of(self, legs: Sequence[LegToAudit]) -> list[Finding]:
        proofs = [leg.proof for leg in legs]
        usual, contexts = contexts_of(self._config, self._model, self._transcript, proofs)
        if max(contexts) > usual:
            await self._compare_prompts()
        found: dict[int, Finding] = {}
        by_size: dict[int, list[int]] = {}
        for place, context in enumerate(contexts):
            if context > usual and proofs[place].prompt in (self._others or ()):
                found[place] = Finding("failed", OTHER_PROMPT)  # without computing that much
            else:
                by_size.setdefault(context, []).append(place)
        for number, (_, places) in enumerate(sorted(by_size.items())):
            if number < MAX_SIZES:
                findings = await self._of_one_size([legs[place] for place in places])
                found |= zip(places, findings, strict=True)
            else:
                why = f"its legs need contexts of more than {MAX_SIZES} sizes"
                found |= dict.fromkeys(places, Finding("not_auditable", why, evaded=True))
        return [found[place] for place in range(len(legs))]

    async def _of_one_size(self, legs: list[LegToAudit]) -> list[Finding]:
        proofs = [leg.proof for leg in legs]
        try:
            async with self._engine(self._transcript, proofs) as engine:
                others = await self._other_prompts(engine)
                audits = await audit_legs(engine, self._transcript, legs)
        except (NotHere, OSError) as error:
            audits = [not_auditable(proof, str(error)) for proof in proofs]
            others = self._others or set()
        pairs = zip(legs, audits, strict=True)
        return [finding_of(audit, leg.proof.prompt in others) for leg, audit in pairs]

    async def _compare_prompts(self) -> None:
        """With an engine of the usual size, if there is room for one."""
        with contextlib.suppress(NotHere):
            async with self._engine(None, ()) as engine:
                await self._other_prompts(engine)

    async def _other_prompts(self, engine: EngineProcess) -> set[int]:
        if self._others is None:
            # With a template of its own this box cannot say what others make of a chat.
            chats = not self._model.settings.template
            self._others = await other_prompts(engine, self._transcript, chats=chats)
        return self._others

    def _engine(
        self, transcript: RequestTranscript | None, proofs: Sequence[Proof]
    ) -> AbstractAsyncContextManager[EngineProcess]:
        return engine_for(self._config, self._model, self._digest, transcript, proofs)


def finding_of(audit: LegAudit, other_prompt: bool) -> Finding:
    """What an audit means for a peer: in bitwise mode a difference is proof.  Another prompt than
    was asked is none, since templates can be configured."""
    result: Result
    if audit.verdict != "differs" and other_prompt:
        return Finding("failed", OTHER_PROMPT)
    if audit.verdict == "agrees":
        result = "agreed"
    elif audit.verdict == "not auditable":
        result = "not_auditable"
    else:
        result = "disproved" if audit.mode == "bitwise" else "failed"
    kept = without_tokens(audit)
    return Finding(result, kept.meaning, msgspec.to_builtins(kept))
