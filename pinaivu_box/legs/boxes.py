"""The boxes and upstreams among which a leg, or the tokenizing of a prompt, finds its place; and
what is learned of them from each leg."""

from __future__ import annotations

import logging
from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from pinaivu_box.bounded import BoundedDict
from pinaivu_box.engine.messages import Tokenized
from pinaivu_box.errors import (
    ApiError,
    EngineLost,
    NoNodesAvailable,
    PeerFaulty,
)
from pinaivu_box.gateway.backend import Job, Leg
from pinaivu_box.gateway.local import LocalBackend
from pinaivu_box.gateway.records import LegRecord
from pinaivu_box.legs.client import PeerClient
from pinaivu_box.legs.upstream_breaker import UpstreamOutcome
from pinaivu_box.receipts.receipt import upstream_digest
from pinaivu_box.routing.candidates import Candidates
from pinaivu_box.routing.circuit_breaker import CircuitBreaker
from pinaivu_box.routing.load import LoadTracker
from pinaivu_box.routing.reputation import Reputation
from pinaivu_box.routing.router import Candidate, Decision
from pinaivu_box.upstream.upstream import Upstream

log = logging.getLogger("pinaivu.legs")

_MAX_PAID = 4096  # prompts of which it is remembered that a leg pays for them


class ChosenBox:
    """A box that was chosen for one leg of a job, which does nothing until it is run: this one, if
    it has no peers.  `route` is why the box was chosen, for the receipt, and `header` for the
    client."""

    is_peer = False
    route: dict[str, Any] | None = None
    header = ""

    def __init__(self, node_id: str, leg: Leg, job: Job) -> None:
        self.node_id, self.leg, self.job = node_id, leg, job

    def served(self, record: LegRecord) -> None:
        """The leg has come to its end."""

    def failed(self, error: ApiError) -> None:
        """The box has refused the leg, or was lost with it."""

    def release(self, record: LegRecord | None) -> None:
        """The leg is over, however it has ended; `record` is None if it never began."""


class OwnBox(ChosenBox):
    """This one, beside its peers."""

    def __init__(
        self, boxes: Boxes, leg: Leg, job: Job, decision: Decision, chosen: Candidate,
        load: LoadTracker,
    ) -> None:  # fmt: skip
        super().__init__(chosen.node_id, leg, job)
        self.route, self.header = decision.record(), decision.header()
        self._load, self._taken = load, ExitStack()
        # At once, so that of several requests that come together each sees where the others went.
        self._taken.enter_context(load.taken(job.model.id))
        boxes.candidates.leg_sent(job, chosen)
        self._taken.callback(boxes.candidates.leg_ended, job, self.node_id)

    def served(self, record: LegRecord) -> None:
        self._load.measured(self.job.model.id, record)

    def release(self, record: LegRecord | None) -> None:
        self._taken.close()


class PeerBox(ChosenBox):
    """A peer.  Of the legs that share a prompt there the first pays for it: `prompt` is its name
    if this one does."""

    is_peer = True

    def __init__(
        self, boxes: Boxes, leg: Leg, job: Job, decision: Decision, chosen: Candidate,
        prompt: str | None,
    ) -> None:  # fmt: skip
        super().__init__(chosen.node_id, leg, job)
        self.route, self.header = decision.record(), decision.header()
        self._boxes, self._prompt, self._offered_speed = boxes, prompt, chosen.tokens_per_s
        boxes.candidates.leg_sent(job, chosen)
        self._sent = boxes.breaker.sent(chosen.node_id)

    def served(self, record: LegRecord) -> None:
        boxes = self._boxes
        boxes.breaker.served(self.node_id)
        boxes.candidates.leg_served(self.node_id)
        if record.finish_reason != "cancelled":
            boxes.reputation.served(self.node_id, self._offered_speed, record.tokens_per_s)

    def failed(self, error: ApiError) -> None:
        if not isinstance(error, EngineLost):
            if isinstance(error, NoNodesAvailable):
                self._boxes.candidates.leg_refused(self.node_id, error)
            return
        seconds = self._boxes.breaker.failed(self.node_id, self._sent)
        log.warning("%s is left alone for %.1f s: %s", self.node_id, seconds, error.message)
        if isinstance(error, PeerFaulty):
            self._boxes.reputation.disputed(self.node_id, error.message)
        else:
            self._boxes.reputation.failed(self.node_id, error.message)

    def release(self, record: LegRecord | None) -> None:
        if self._prompt is not None and (record is None or record.proved is None):
            self._boxes.paid.pop(self._prompt, None)  # then the next one pays
        self._boxes.candidates.leg_ended(self.job, self.node_id)


class UpstreamPlace(ChosenBox):
    """An upstream, which is no box, and no peer: what it serves is paid to nobody here."""

    def __init__(
        self, boxes: Boxes, upstream: Upstream, job: Job, decision: Decision, chosen: Candidate
    ) -> None:
        super().__init__(upstream.id, upstream.start(job), job)
        self.route, self.header = decision.record(), decision.header()
        self._boxes = boxes
        boxes.candidates.leg_sent(job, chosen)
        self._outcome = UpstreamOutcome(boxes.breaker, upstream)

    def served(self, record: LegRecord) -> None:
        self._outcome.served(record)

    def failed(self, error: ApiError) -> None:
        self._outcome.failed(error)

    def release(self, record: LegRecord | None) -> None:
        self._boxes.candidates.leg_ended(self.job, self.node_id)


class Boxes:
    """This box with its peers and upstreams; without `peers` there are none of the former."""

    def __init__(
        self,
        candidates: Candidates,
        local: LocalBackend,
        peers: PeerClient | None,
        load: LoadTracker,
        breaker: CircuitBreaker,
        reputation: Reputation,
    ) -> None:
        self.candidates, self.breaker, self.reputation = candidates, breaker, reputation
        self.paid: BoundedDict[str, None] = BoundedDict(_MAX_PAID)
        self._local, self._peers, self._load = local, peers, load

    def may_choose(self, job: Job) -> bool:
        """Whether there may be others than this box to choose from."""
        return self._peers is not None or bool(self.candidates.upstreams.with_model(job.model.id))

    async def choose(self, job: Job, tried: Collection[str]) -> ChosenBox | NoNodesAvailable:
        """The box for a leg of the job, none of those that were `tried`; or why there is none."""
        decision = await self.candidates.select(job, tried)
        chosen, job = decision.chosen, job.as_leg()
        if chosen is None:
            return _nobody(job, decision)
        for upstream in self.candidates.upstreams.all:
            if upstream.name == chosen.upstream:
                return UpstreamPlace(self, upstream, job, decision, chosen)
        if chosen.destination is None or self._peers is None:
            return OwnBox(self, self._local.start(job), job, decision, chosen, self._load)
        prompt = f"{job.request_id} {job.prompt_number} {chosen.node_id}"
        pays = self._pays(prompt)
        leg = self._peers.start(job, replace(chosen.destination, pays_prompt=pays))
        return PeerBox(self, leg, job, decision, chosen, prompt if pays else None)

    async def tokenize(
        self,
        job: Job,
        tokens: list[int] | None = None,
        *,
        plain: bool = False,
        count: bool = False,
    ) -> tuple[Tokenized, int]:
        """See `gateway.backend.Tokenizer`: with an engine here, or by a peer if the model is only
        there; of an upstream's model, tokens are estimated."""
        if not job.model.remote:
            return await self._local.tokenize(job, tokens, plain=plain, count=count)
        of_upstream = job.model.recorded_digest == upstream_digest(job.model.id)
        if of_upstream or self._peers is None:
            return self.candidates.upstreams.tokenize(job, tokens, plain=plain)
        tried: list[str] = []
        error: ApiError | None = None
        while True:
            decision = await self.candidates.select(job, tried)
            if (to := decision.destination) is None:
                raise error or _nobody(job, decision)
            tried.append(to.node_id)
            try:
                return await self._peers.tokenize(job, to, tokens, plain=plain)
            except ApiError as failure:
                if isinstance(failure, NoNodesAvailable) and not isinstance(failure, EngineLost):
                    self.candidates.leg_refused(to.node_id, failure)
                elif error is not None and not isinstance(failure, NoNodesAvailable):
                    raise
                error = failure

    def _pays(self, prompt: str) -> bool:
        """Whether it is the first leg of its prompt there."""
        first = prompt not in self.paid
        self.paid[prompt] = None
        return first


def _nobody(job: Job, decision: Decision) -> NoNodesAvailable:
    return NoNodesAvailable(
        f"Nobody can serve {job.model.id} now: {decision.why_nobody()}.  Try again later.",
        retry_after=2,
    )
