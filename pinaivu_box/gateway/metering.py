"""The account of a request: what it used, the proofs and the receipt, written in one go."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from pinaivu_box import amount
from pinaivu_box.config import PricingConfig
from pinaivu_box.gateway.backend import Job, Output, Prompt, Started, committed
from pinaivu_box.identity import Identity
from pinaivu_box.receipts import commitment
from pinaivu_box.receipts.receipt import (
    Price,
    Proof,
    Receipt,
    Usage,
    sampling_record,
    sign_proof,
    sign_receipt,
    total_tokens,
    utc_text,
)
from pinaivu_box.store.database import Database
from pinaivu_box.store.requests import RequestRow, StoredReceipt, settle

ENGINE_LOST = "engine_lost"  # finish reason of a leg whose engine died


@dataclass
class Leg:
    """What one node did.  `began` is monotonic, `started_at` Unix seconds."""

    started: Started
    began: float = field(default_factory=time.monotonic)
    started_at: float = field(default_factory=time.time)
    prompt: list[int] | None = None
    tokens: list[int] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    finish_reason: str = ENGINE_LOST
    ttft_ms: int | None = None
    duration_ms: int = 0
    cached_tokens: int = 0
    shifted_tokens: int = 0

    def take(self, event: Prompt | Output) -> None:
        if isinstance(event, Prompt):
            self.prompt = event.tokens
            return
        if event.tokens and self.ttft_ms is None:
            self.ttft_ms = self._elapsed_ms()
        self.tokens += event.tokens
        self.text.append(event.text)
        self.finish_reason = event.finish_reason or self.finish_reason
        self.duration_ms = self._elapsed_ms()
        self.cached_tokens = event.cached_tokens or self.cached_tokens
        self.shifted_tokens = event.shifted_tokens

    def _elapsed_ms(self) -> int:
        return round((time.monotonic() - self.began) * 1000)


@dataclass
class Branch:
    """One answer of a request: the legs that made it."""

    job: Job
    legs: list[Leg] = field(default_factory=list)

    @property
    def served(self) -> list[Leg]:
        """The legs in which a prompt was at least read: those that have a proof."""
        return [leg for leg in self.legs if leg.prompt is not None]

    @property
    def made(self) -> list[int]:
        """All tokens of the output so far."""
        return [token for leg in self.legs for token in leg.tokens]

    @property
    def text(self) -> str:
        return "".join(part for leg in self.served for part in leg.text)


@dataclass
class Account:
    """Of one request, from its arrival to its receipt; `jobs` has one for each of its choices."""

    jobs: list[Job]
    key_id: str
    created: float = field(default_factory=time.time)  # Unix seconds
    began: float = field(default_factory=time.monotonic)
    queue_ms: int | None = None
    ttft_ms: int | None = None
    total_ms: int = 0

    def __post_init__(self) -> None:
        self.branches = [Branch(job) for job in self.jobs]

    @property
    def job(self) -> Job:
        """The first; request id, model and tenant are the same for all."""
        return self.jobs[0]

    def start_leg(self, branch: Branch, started: Started) -> None:
        branch.legs = [*branch.served, Leg(started)]

    def take(self, branch: Branch, event: Prompt | Output) -> None:
        branch.legs[-1].take(event)
        if isinstance(event, Output):
            if event.queue_ms is not None and self.queue_ms is None:
                self.queue_ms = round(event.queue_ms)
            if event.tokens and self.ttft_ms is None:
                self.ttft_ms = self.elapsed_ms()

    @property
    def served(self) -> list[tuple[Branch, Leg]]:
        """The legs that have a proof, in the order of the proofs."""
        return [(branch, leg) for branch in self.branches for leg in branch.served]

    @property
    def prompts(self) -> list[Leg]:
        """The first leg of each prompt: choices share it, and pay for it once."""
        first: dict[int, Leg] = {}
        for branch, leg in self.served:
            first.setdefault(branch.job.prompt_number, leg)
        return list(first.values())

    @property
    def prompt_tokens(self) -> int:
        return sum(len(leg.prompt or ()) for leg in self.prompts)

    @property
    def cached_tokens(self) -> int:
        return sum(leg.cached_tokens for leg in self.prompts)

    @property
    def shifted_tokens(self) -> int:
        return sum(leg.shifted_tokens for _, leg in self.served)

    @property
    def completion_tokens(self) -> int:
        return sum(len(leg.tokens) for _, leg in self.served)

    def elapsed_ms(self) -> int:
        return round((time.monotonic() - self.began) * 1000)


class Meter:
    def __init__(self, identity: Identity, database: Database, pricing: PricingConfig) -> None:
        self._identity = identity
        self._database = database
        self._pricing = pricing

    async def settle(self, account: Account, finish_reason: str) -> None:
        """Sign and write; returns when usage, receipt and the key's counters are on disk."""
        account.total_ms = account.elapsed_ms()
        job, last = account.job, account.served[-1][1].started
        price = self._price(job.model.id)
        read = [token for leg in account.prompts for token in leg.prompt or ()]
        prompt, prompt_opening = commitment.commit(asked_text(account.jobs), read)
        proofs, openings = self._prove(account, price, prompt)
        made = [token for branch in account.branches for token in branch.made]
        text = commitment.output_text([branch.text for branch in account.branches])
        output, output_opening = commitment.commit(text, made)
        cost = amount.cost(total_tokens(proofs), price.per_1k_tokens)
        receipt = Receipt(
            request_id=job.request_id,
            timestamp=utc_text(account.created),
            coordinator_id=self._identity.node_id,
            node_id=last.node_id,
            model=job.model.id,
            model_digest=last.model_digest,
            payment_amount=amount.to_text(cost),
            currency=price.currency,
            finish_reason=finish_reason,
            routing=_routing(account),
            proofs=[sign_proof(self._identity, proof) for proof in proofs],
            prompt_commitment=prompt,
            output_commitment=output,
            usage=Usage(account.prompt_tokens, account.completion_tokens, account.cached_tokens),
        )
        signed, signature = sign_receipt(self._identity, receipt)
        opening = {"prompt": prompt_opening, "output": output_opening, "legs": openings}
        await settle(
            self._database,
            self._row(account, receipt, cost),
            StoredReceipt(job.request_id, signed, signature, msgspec.json.encode(opening)),
        )

    def _price(self, model_id: str) -> Price:
        per_1k = self._pricing.models.get(model_id, self._pricing.per_1k_tokens)
        return Price(self._pricing.currency, per_1k)

    def _prove(
        self, account: Account, price: Price, prompt_commitment: str
    ) -> tuple[list[Proof], list[commitment.Opening]]:
        proofs, openings = [], []
        for number, (branch, leg) in enumerate(account.served):
            output, opening = commitment.commit("".join(leg.text), leg.tokens)
            openings.append(opening)
            proofs.append(
                Proof(
                    request_id=branch.job.request_id,
                    leg=number,
                    choice=branch.job.choice,
                    prompt=branch.job.prompt_number,
                    node_id=leg.started.node_id,
                    model=account.job.model.id,
                    model_digest=leg.started.model_digest,
                    engine=leg.started.engine,
                    sampling=sampling_record(leg.started.sampling, branch.job.max_tokens),
                    prompt_commitment=prompt_commitment,
                    output_commitment=output,
                    prompt_tokens=len(leg.prompt or []),
                    completion_tokens=len(leg.tokens),
                    cached_tokens=leg.cached_tokens,
                    shifted_tokens=leg.shifted_tokens,
                    finish_reason=leg.finish_reason,
                    started_at=utc_text(leg.started_at),
                    ttft_ms=leg.ttft_ms,
                    duration_ms=leg.duration_ms,
                    price=price,
                )
            )
        return proofs, openings

    def _row(self, account: Account, receipt: Receipt, cost: int) -> RequestRow:
        return RequestRow(
            request_id=receipt.request_id,
            key_id=account.key_id,
            created_at=int(account.created * 1000),
            model=receipt.model,
            node_id=receipt.node_id,
            finish_reason=receipt.finish_reason,
            prompt_tokens=receipt.usage.prompt_tokens,
            cached_tokens=receipt.usage.cached_tokens,
            completion_tokens=receipt.usage.completion_tokens,
            amount=cost,
            queue_ms=account.queue_ms,
            ttft_ms=account.ttft_ms,
            total_ms=account.total_ms,
        )


def _routing(account: Account) -> dict[str, Any]:
    # Until peers and upstreams exist there is one candidate, and it wins.
    chosen = account.served[-1][1].started.node_id
    return {"policy": "local", "candidates": [{"node_id": chosen, "backend": "local"}]}


def asked_text(jobs: Sequence[Job]) -> str:
    """What the client asked, as the prompt's commitment covers it."""
    job = jobs[0]
    if job.prompt is None and job.inputs is None:
        more = committed(job.tools, job.constraint)
        return commitment.prompt_text(job.messages, job.stop, **more)
    if job.inputs is not None:
        return commitment.prompt_text([], job.stop, input=job.inputs)
    prompts = {job.prompt_number: job.prompt for job in jobs}
    more = {"suffix": job.suffix} if job.suffix else {}
    return commitment.prompt_text([], job.stop, prompt=list(prompts.values()), **more)
