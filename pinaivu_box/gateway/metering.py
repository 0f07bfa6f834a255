"""The account of a request: what it used, the proofs and the receipt, written in one go."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec

from pinaivu_box import amount
from pinaivu_box.amount import Prices
from pinaivu_box.gateway import logprob_records
from pinaivu_box.gateway.backend import Job, Output, Prompt, Proved, Started, committed
from pinaivu_box.identity import Identity, verify
from pinaivu_box.receipts import commitment
from pinaivu_box.receipts.receipt import (
    MARK_DOMAIN,
    Price,
    Proof,
    Receipt,
    SignedProof,
    TokenUsage,
    mark_text,
    sampling_record,
    sign_proof,
    sign_receipt,
    total_cost,
    utc_text,
)
from pinaivu_box.store.database import Database
from pinaivu_box.store.requests import RequestRow, StoredReceipt, settle

ENGINE_LOST = "engine_lost"  # finish reason of a leg whose engine died


@dataclass
class LegRecord:
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
    logprobs: int = 0
    begun: bool = False  # the engine has computed something of it
    queue_ms: float = 0.0
    mark: str | None = None
    proved: Proved | None = None
    extras: commitment.Extras = field(default_factory=commitment.Extras)

    def take(self, event: Prompt | Output | Proved, records: Sequence[bytes] = ()) -> None:
        """`records` are of the output's log-probabilities (see `shown`)."""
        if isinstance(event, Proved):
            self.proved = event
            return
        if isinstance(event, Prompt):
            self.prompt = event.tokens
            return
        if event.tokens and self.ttft_ms is None:
            self.ttft_ms = self._elapsed_ms()
        if event.queue_ms is not None:
            self.begun, self.queue_ms = True, event.queue_ms
        self.tokens += event.tokens
        self.text.append(event.text)
        self.finish_reason = event.finish_reason or self.finish_reason
        self.duration_ms = self._elapsed_ms()
        self.cached_tokens = event.cached_tokens or self.cached_tokens
        self.shifted_tokens = event.shifted_tokens
        self.logprobs += len(event.logprobs)
        self.extras.add(records, event.vectors)
        self.mark = event.mark

    @property
    def tokens_per_s(self) -> float | None:
        """After the first; None if there are too few to say."""
        if self.ttft_ms is None or len(self.tokens) < 2 or self.duration_ms <= self.ttft_ms:
            return None
        return (len(self.tokens) - 1) * 1000 / (self.duration_ms - self.ttft_ms)

    def _elapsed_ms(self) -> int:
        return round((time.monotonic() - self.began) * 1000)


@dataclass
class ChoiceRecord:
    """One answer of a request: the legs that made it."""

    job: Job
    legs: list[LegRecord] = field(default_factory=list)
    tried: tuple[str, ...] = ()
    thinking: bool = False  # whether its prompt ends in the model's thoughts
    extras: commitment.Extras = field(default_factory=commitment.Extras)  # of all legs

    def failed(self, node_id: str) -> None:
        """A leg was lost there; nodes that have not failed are asked first."""
        self.tried = (*self.tried, node_id) if node_id else self.tried

    def read(self, prompt: Prompt) -> None:
        """The prompt of the latest leg.  Texts are read anew in each, and whoever was lost gave
        nothing: what it made of them is not what is paid for."""
        self.thinking = prompt.thinking
        if self.job.inputs is not None:
            for leg in self.served:
                leg.prompt = prompt.tokens

    def next_job(self) -> Job:
        """The job of the next leg: it reads and draws as the first one did."""
        job = replace(self.job, scored=self.scored, leg=len(self.served), tried=self.tried)
        if not self.served:
            return job
        first = self.served[0]
        read = job.read if job.inputs is not None else first.prompt
        return replace(
            job,
            settled=first.started.sampling,
            digest=first.started.model_digest,
            read=read,
            unsaid=self.unsaid,
            thinking=self.thinking or job.thinking,
        )

    @property
    def served(self) -> list[LegRecord]:
        """The legs in which a prompt was at least read: those that have a proof."""
        return [leg for leg in self.legs if leg.prompt is not None]

    @property
    def made(self) -> list[int]:
        """All tokens of the output so far."""
        return [token for leg in self.legs for token in leg.tokens]

    @property
    def scored(self) -> int:
        """Tokens of its echoed prompt whose log-probabilities have come."""
        prompt = len(self.served[0].prompt or ()) if self.served else 0
        return min(prompt, sum(leg.logprobs for leg in self.served))

    @property
    def unsaid(self) -> int:
        """The last tokens of the output whose log-probabilities have not come: their text was held
        back when the leg was lost."""
        if self.job.logprobs is None:
            return 0
        said = sum(leg.logprobs for leg in self.served) - (self.scored if self.job.echo else 0)
        return max(0, len(self.made) - said)

    @property
    def text(self) -> str:
        return "".join(part for leg in self.served for part in leg.text)


@dataclass
class RequestAccount:
    """Of one request, from its arrival to its receipt; `jobs` has one for each of its choices.

    `period`: when the period of the key's budget began (see `store.keys.charge`).
    """

    jobs: list[Job]
    key_id: str
    prices: Prices
    period: int = 0
    cost: int = 0  # 10^-9 of the currency, once it is settled
    created: float = field(default_factory=time.time)  # Unix seconds
    began: float = field(default_factory=time.monotonic)
    queue_ms: int | None = None
    ttft_ms: int | None = None
    total_ms: int = 0

    def __post_init__(self) -> None:
        self.branches = [ChoiceRecord(job) for job in self.jobs]

    @property
    def job(self) -> Job:
        """The first; request id, model and tenant are the same for all."""
        return self.jobs[0]

    def start_leg(self, branch: ChoiceRecord, started: Started) -> None:
        branch.legs = [*branch.served, LegRecord(started)]

    def take(self, branch: ChoiceRecord, event: Prompt | Output | Proved) -> None:
        leg = branch.legs[-1]
        if not isinstance(event, Output):
            leg.take(event)
            if isinstance(event, Prompt):
                branch.read(event)
        else:
            said = sum(leg.logprobs for leg in branch.served) if event.logprobs else 0
            records = logprob_records.records(branch.job, event.logprobs, said)
            leg.take(event, records)
            branch.extras.add(records, event.vectors)
            if event.queue_ms is not None and self.queue_ms is None:
                self.queue_ms = round(event.queue_ms)
            if event.tokens and self.ttft_ms is None:
                self.ttft_ms = self.elapsed_ms()
            if event.finish_reason == "cancelled" and not leg.begun:
                branch.legs.pop()  # it only waited: there is nothing to pay for

    @property
    def served(self) -> list[tuple[ChoiceRecord, LegRecord]]:
        """The legs that have a proof, in the order of the proofs."""
        return [(branch, leg) for branch in self.branches for leg in branch.served]

    @property
    def numbered(self) -> list[tuple[ChoiceRecord, int, LegRecord]]:
        """The same, with their numbers within a choice."""
        return [
            (branch, number, leg)
            for branch in self.branches
            for number, leg in enumerate(branch.served)
        ]

    @property
    def prompts(self) -> list[tuple[ChoiceRecord, LegRecord]]:
        """The first leg of each prompt: choices share it, and pay for it once."""
        first: dict[int, tuple[ChoiceRecord, LegRecord]] = {}
        for branch, leg in self.served:
            first.setdefault(branch.job.prompt_number, (branch, leg))
        return [first[number] for number in sorted(first)]

    @property
    def prompt_tokens(self) -> int:
        return sum(len(leg.prompt or ()) for _, leg in self.prompts)

    @property
    def cached_tokens(self) -> int:
        return sum(leg.cached_tokens for _, leg in self.prompts)

    @property
    def shifted_tokens(self) -> int:
        return sum(leg.shifted_tokens for _, leg in self.served)

    @property
    def completion_tokens(self) -> int:
        return sum(len(leg.tokens) for _, leg in self.served)

    def elapsed_ms(self) -> int:
        return round((time.monotonic() - self.began) * 1000)


class Meter:
    def __init__(self, identity: Identity, database: Database, currency: str) -> None:
        self.currency = currency
        self._identity = identity
        self._database = database

    async def settle(self, account: RequestAccount, finish_reason: str) -> None:
        """Sign and write; returns when usage, receipt and the key's counters are on disk."""
        account.total_ms = account.elapsed_ms()
        job, last = account.job, account.served[-1][1].started
        price = self._price(account.prices)
        prompts = [_prompt(branch, leg) for branch, leg in account.prompts]
        proofs, openings = await self._prove(account, price)
        made = [token for branch in account.branches for token in branch.made]
        text = commitment.output_text([branch.text for branch in account.branches])
        extras = [branch.extras for branch in account.branches]
        output, opened = commitment.commit_output(text, made, extras, commitment.new_nonce())
        account.cost = total_cost([proof for proof, _ in proofs], price)
        receipt = Receipt(
            request_id=job.request_id,
            timestamp=utc_text(account.created),
            coordinator_id=self._identity.node_id,
            node_id=last.node_id,
            model=job.model.id,
            model_digest=last.model_digest,
            payment_amount=amount.to_text(account.cost),
            currency=price.currency,
            finish_reason=finish_reason,
            routing=_routing(account),
            proofs=[signed for _, signed in proofs],
            prompt_commitment=commitment.of_several([prompt for prompt, _ in prompts]),
            output_commitment=output,
            usage=TokenUsage(
                account.prompt_tokens, account.completion_tokens, account.cached_tokens
            ),
            price=price,
        )
        signed, signature = sign_receipt(self._identity, receipt)
        opening = {"prompt": prompts[0][1], "output": opened, "legs": openings}
        if len(prompts) > 1:
            opening["prompts"] = [one for _, one in prompts]
        await settle(
            self._database,
            self._row(account, receipt),
            StoredReceipt(signed, signature, msgspec.json.encode(opening)),
            account.period,
        )

    def _price(self, prices: Prices) -> Price:
        cached = prices.prompt if prices.cached is None else prices.cached
        return Price(self.currency, prices.prompt, cached, prices.completion)

    async def _prove(
        self, account: RequestAccount, price: Price
    ) -> tuple[list[tuple[Proof, SignedProof]], list[commitment.Opening]]:
        proofs, openings = [], []
        for branch, number, leg in account.numbered:
            await asyncio.sleep(0)  # there may be many, each of a long prompt: others go between
            if leg.proved is not None:
                proofs.append((leg.proved.proof, leg.proved.signed))
                openings.append(leg.proved.opening)
                continue
            # Of a peer that was lost: its price is not known to be owed, nor its word given.
            proof, opening = prove(branch.job, number, leg, price)
            if leg.started.node_id != self._identity.node_id:
                mark = leg.mark if _is_mark(proof, leg.mark) else None
                proof = msgspec.structs.replace(proof, witness=self._identity.node_id, mark=mark)
            proofs.append((proof, sign_proof(self._identity, proof)))
            openings.append(opening)
        return proofs, openings

    def _row(self, account: RequestAccount, receipt: Receipt) -> RequestRow:
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
            amount=account.cost,
            queue_ms=account.queue_ms,
            ttft_ms=account.ttft_ms,
            total_ms=account.total_ms,
        )


def prove(job: Job, number: int, leg: LegRecord, price: Price) -> tuple[Proof, commitment.Opening]:
    """What there is to sign of leg `number` of a choice."""
    prompt, _ = commitment.commit(asked_text(job), leg.prompt or [], job.nonce)
    nonce = leg.started.nonce or commitment.new_nonce()
    text = "".join(leg.text)
    if leg.started.proof == 1:
        output, opening = commitment.commit(text, leg.tokens, nonce)
    else:
        output, opening = commitment.commit_output(text, leg.tokens, [leg.extras], nonce)
    proof = Proof(
        request_id=job.request_id,
        leg=number,
        choice=job.choice,
        prompt=job.prompt_number,
        node_id=leg.started.node_id,
        model=job.model.id,
        model_digest=leg.started.model_digest,
        engine=leg.started.engine,
        sampling=sampling_record(leg.started.sampling, job.max_tokens),
        prompt_commitment=prompt,
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
        v=leg.started.proof,
    )
    return proof, opening


def _is_mark(proof: Proof, mark: str | None) -> bool:
    """Whether the node has signed that much."""
    text = mark_text(
        proof.request_id, proof.choice, proof.leg, proof.completion_tokens, proof.output_commitment
    )
    return mark is not None and verify(proof.node_id, MARK_DOMAIN, text, bytes.fromhex(mark))


def _prompt(branch: ChoiceRecord, leg: LegRecord) -> tuple[str, commitment.Opening]:
    return commitment.commit(asked_text(branch.job), leg.prompt or [], branch.job.nonce)


def _routing(account: RequestAccount) -> dict[str, Any]:
    """How the first leg found its node; of the others, where they went and why."""
    routes = [leg.started.route for _, leg in account.served]
    first = routes[0] or {"policy": "local", "chosen": account.served[0][1].started.node_id}
    return {**first, "legs": [one for one in routes[1:] if one]} if any(routes[1:]) else first


def asked_text(job: Job) -> str:
    """What the client asked, as the prompt's commitment covers it."""
    if job.inputs is not None:
        return commitment.prompt_text([], job.stop, input=job.inputs)
    if job.prompt is None:
        more = committed(job.tools, job.constraint)
        return commitment.prompt_text(job.messages, job.stop, **more)
    more = {"suffix": job.suffix} if job.suffix else {}
    return commitment.prompt_text([], job.stop, prompt=[job.prompt], **more)
