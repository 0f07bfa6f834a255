"""Prompts that are read and not run: by an engine here, or by a peer if the model is only there."""

from __future__ import annotations

from dataclasses import replace

from pinaivu_box.engine.messages import Tokenized
from pinaivu_box.errors import ApiError, EngineLost, NoNodesAvailable
from pinaivu_box.gateway.backend import Job
from pinaivu_box.gateway.local import LocalBackend
from pinaivu_box.legs import wire as leg_wire
from pinaivu_box.legs.boxes import nobody
from pinaivu_box.legs.client import PeerClient
from pinaivu_box.routing.candidates import Candidates
from pinaivu_box.routing.selector import Selector


class PromptReader:
    """See `gateway.local.LocalBackend`, of which it has the same methods."""

    def __init__(
        self, local: LocalBackend, peers: PeerClient, candidates: Candidates, selector: Selector
    ) -> None:
        self._local, self._peers = local, peers
        self._candidates, self._selector = candidates, selector

    async def read(self, job: Job) -> tuple[Job, int]:
        """The job with its prompt's tokens, and the context of its model."""
        if not job.model.remote:
            return await self._local.read(job)
        prompt = await self._count(job, None, plain=False)
        return replace(job, read=prompt.tokens, thinking=prompt.thinking), prompt.context

    async def tokenize(
        self,
        job: Job,
        tokens: list[int] | None = None,
        *,
        plain: bool = False,
        count: bool = False,
    ) -> Tokenized:
        if not job.model.remote:
            return await self._local.tokenize(job, tokens, plain=plain, count=count)
        prompt = await self._count(job, tokens, plain=plain)
        return Tokenized(job.id, prompt.tokens, prompt.text, prompt.thinking)

    async def _count(self, job: Job, tokens: list[int] | None, *, plain: bool) -> leg_wire.Tokens:
        tried: list[str] = []
        error: ApiError | None = None
        while True:
            decision, digest = await self._selector.select(job, tried)
            if decision.node_id is None:
                raise error or nobody(job, decision)
            tried.append(decision.node_id)
            try:
                to = self._candidates.destination(job, decision.node_id, digest)
                return await self._peers.count(job, to, tokens, plain=plain)
            except ApiError as failure:
                if isinstance(failure, NoNodesAvailable) and not isinstance(failure, EngineLost):
                    self._candidates.leg_refused(decision.node_id, failure)
                elif error is not None and not isinstance(failure, NoNodesAvailable):
                    raise
                error = failure
