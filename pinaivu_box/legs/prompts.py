"""Tokenizes prompts: with an engine here, or at a peer if the model is only there."""

from __future__ import annotations

from pinaivu_box.engine.messages import Tokenized
from pinaivu_box.errors import ApiError, EngineLost, NoNodesAvailable
from pinaivu_box.gateway.backend import Job
from pinaivu_box.gateway.local import LocalBackend
from pinaivu_box.legs import wire as leg_wire
from pinaivu_box.legs.boxes import nobody
from pinaivu_box.legs.client import PeerClient
from pinaivu_box.routing.candidates import Candidates


class PromptTokenizer:
    """See `gateway.backend.Tokenizer`."""

    def __init__(self, local: LocalBackend, peers: PeerClient, candidates: Candidates) -> None:
        self._local, self._peers, self._candidates = local, peers, candidates

    async def tokenize(
        self,
        job: Job,
        tokens: list[int] | None = None,
        *,
        plain: bool = False,
        count: bool = False,
    ) -> tuple[Tokenized, int]:
        if not job.model.remote:
            return await self._local.tokenize(job, tokens, plain=plain, count=count)
        prompt = await self._count(job, tokens, plain=plain)
        return Tokenized(job.id, prompt.tokens, prompt.text, prompt.thinking), prompt.context

    async def _count(self, job: Job, tokens: list[int] | None, *, plain: bool) -> leg_wire.Tokens:
        tried: list[str] = []
        error: ApiError | None = None
        while True:
            decision = await self._candidates.select(job, tried)
            if (to := decision.destination) is None:
                raise error or nobody(job, decision)
            tried.append(to.node_id)
            try:
                return await self._peers.count(job, to, tokens, plain=plain)
            except ApiError as failure:
                if isinstance(failure, NoNodesAvailable) and not isinstance(failure, EngineLost):
                    self._candidates.leg_refused(to.node_id, failure)
                elif error is not None and not isinstance(failure, NoNodesAvailable):
                    raise
                error = failure
