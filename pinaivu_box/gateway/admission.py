"""Admission: whether a request may run now, and how much it may use, before anything is spent."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from pinaivu_box.amount import Prices
from pinaivu_box.engine.messages import Tokenized
from pinaivu_box.errors import (
    ApiError,
    InvalidBody,
    KeyBlocked,
    ModelNotAllowed,
    ModelNotFound,
    NoNodesAvailable,
    Unauthorized,
    quoted,
)
from pinaivu_box.gateway.backend import Job, Tokenizer
from pinaivu_box.gateway.quota import MINUTE, Entry, Limits, Quota, Quotas, Reservation
from pinaivu_box.gateway.scopes import scope_of
from pinaivu_box.models.catalog import Model
from pinaivu_box.models.names import MAX_NAME, is_model_id, spellings
from pinaivu_box.models.prices import prices_of
from pinaivu_box.policy import Policy
from pinaivu_box.settings import LiveSettings
from pinaivu_box.store import keys
from pinaivu_box.store.database import Database
from pinaivu_box.store.keys import Key
from pinaivu_box.store.requests import between
from pinaivu_box.store.times import now_ms
from pinaivu_box.tasks import ignore_exception

_WRITTEN_SECONDS = 5.0  # that a write shows that another will succeed


@dataclass(frozen=True)
class AdmittedRequest:
    """A request that may run, at these prices, with what it has reserved; `elsewhere` says whether
    others, peers or upstreams, have its model."""

    jobs: list[Job]
    key: Key
    prices: Prices
    reservation: Reservation
    elsewhere: bool = False


def limits_of(key: Key) -> Limits:
    """The limits of a key as it is now."""
    policy = key.policy
    return Limits(
        f"The key {key.label}",
        rpm=policy.rpm,
        tpm=policy.tpm,
        max_parallel=policy.max_parallel,
        max_queue=policy.max_queue,
        budget=policy.budget,
        budget_since=key.created_at,
    )


def refusal(key: Key) -> ApiError | None:
    """Why a key cannot be used now, or None."""
    if key.revoked_at is not None:
        return Unauthorized(f"The API key {key.label} has been revoked.")
    if key.expired(now_ms()):
        return Unauthorized(f"The API key {key.label} has expired.")
    if key.blocked is not None:
        return KeyBlocked(f"The API key {key.label} is blocked: {key.blocked}.")
    return None


async def check_writable(database: Database) -> None:
    """Raise NoNodesAvailable if nothing can be recorded: then nothing is computed."""
    if (why := await database.why_not_writable(_WRITTEN_SECONDS)) is not None:
        raise NoNodesAvailable(
            f"This box cannot record what it serves, so it serves nothing now: {why}.  Try again "
            "later.",
            retry_after=5,
        )


def under(key: Key, job: Job) -> Job:
    """The job with the settings of its key."""
    policy = key.policy
    return replace(
        job,
        scope=scope_of(key),
        shared_prefixes=not policy.local_only,
        weight=policy.weight,
        local_only=policy.local_only,
        peers=policy.peers,
        routing=policy.routing,
    )


class RemoteModels(Protocol):
    """The models of peers and of upstreams."""

    def find(self, model_id: str) -> Model:
        """The model here, or else at one of them.  Raises ModelNotFound."""
        ...

    def remote_models(self) -> list[Model]:
        """Those that only they have."""
        ...

    def offered(self, model_id: str) -> bool:
        """Whether any of them has it."""
        ...


class Admission:
    """Admits requests: checks the model, its queue and the key, and reserves the key's quota.

    `in_flight` counts the unfinished requests of a model, `places` says how many of its sequences
    run at a time.  `tokenizer` and `remote` are replaced by those of a box with peers.
    """

    def __init__(
        self,
        settings: LiveSettings,
        tokenizer: Tokenizer,
        database: Database,
        in_flight: Callable[[str], int],
    ) -> None:
        self.tokenizer = tokenizer
        self.remote: RemoteModels | None = None
        self.places: Callable[[str], int] = lambda _: settings.config.engine.max_sequences
        self._settings, self._database, self._in_flight = settings, database, in_flight
        self._drain = asyncio.get_running_loop().create_future()
        self._quotas = Quotas(self._read_quota)

    @property
    def draining(self) -> bool:
        return self._drain.done()

    def drain(self) -> None:
        """Refuse requests from now on, and those whose prompt is still being counted."""
        if not self.draining:
            self._drain.set_result(None)

    def check(self, model_id: str, key: Key) -> Model:
        """The model that serves the request.

        Raises InvalidBody, ModelNotFound, ModelNotAllowed, NoNodesAvailable.
        """
        if not is_model_id(model_id):
            raise InvalidBody(
                f"'{quoted(model_id)}' is not a model id: write it as name:tag, in at most "
                f"{MAX_NAME} characters.",
                loc=("body", "model"),
            )
        model = self.find(model_id, key.policy)
        self._check(model, key)
        return model

    def find(self, model_id: str, policy: Policy) -> Model:
        """The model of that id, or that an alias leads to, for a key with that policy: what the key
        may use is said by the models' own ids.  Raises ModelNotFound."""
        catalog = self._settings.catalog
        remote = None if policy.local_only else self.remote
        target = catalog.aliases.target_of(model_id)
        try:
            return (remote or catalog).find(target or model_id)
        except ModelNotFound as error:
            if target is None:
                raise
            raise ModelNotFound(
                f"'{quoted(model_id)}' is an alias of {target}, which is not served here.",
                param="model",
            ) from error

    def models(self, policy: Policy) -> list[Model]:
        """What a key with that policy may use."""
        models = self._settings.catalog.models
        if self.remote and not policy.local_only:
            models = [*models, *self.remote.remote_models()]
        return [model for model in models if policy.serves(model.id)]

    def aliases(self, policy: Policy) -> list[tuple[str, Model]]:
        """The aliases of what a key with that policy may use, by name."""
        served = {model.id: model for model in self.models(policy)}
        usable = []
        for alias, target in self._settings.catalog.aliases.items():
            ids = [model_id for model_id in spellings(target) if model_id in served]
            usable += [(alias, served[model_id]) for model_id in ids[:1]]
        return usable

    def _check(self, model: Model, key: Key) -> None:
        if self.draining:
            raise draining()
        if not key.policy.serves(model.id):
            raise ModelNotAllowed(
                f"The key {key.label} may not use {model.id}, only what fits "
                f"{', '.join(key.policy.models)}.",
                param="model",
            )
        engine = self._settings.config.engine
        full = self._in_flight(model.id) >= self.places(model.id) + engine.max_queue
        if full and not self._is_elsewhere(model):
            raise NoNodesAvailable(
                f"The queue of {model.id} is full ({engine.max_queue} requests wait): try "
                "again later.",
                retry_after=2,
            )

    def _is_elsewhere(self, model: Model) -> bool:
        return self.remote is not None and self.remote.offered(model.id)

    def prices(self, key: Key, model: Model) -> Prices:
        """The key's own, or the model's, or those of all models."""
        return key.policy.prices_of(model.id) or prices_of(model, self._settings.config.pricing)

    async def count_request(self, key: Key) -> Entry:
        """Count a request before its body is read, for `admit`.  Raises RateLimited."""
        return (await self._quotas.of(key.id)).count_request(limits_of(key))

    async def admit(
        self, key: Key, jobs: list[Job], counted: Entry | None = None
    ) -> AdmittedRequest:
        """Reserve what the request may use at most.

        Raises what `check` and `Quota.reserve` do, and what the engine says if it cannot read the
        prompt.  May be cancelled.
        """
        jobs = [under(key, job) for job in jobs]
        model, context = jobs[0].model, 0
        quota, least = await self._quotas.of(key.id), self.prices(key, model).most(1, 0)
        quota.check(limits_of(key), cost=least, counted=counted)
        await check_writable(self._database)
        if key.policy.tpm is not None or key.policy.budget is not None:
            jobs, context = await self._read(jobs)
        # Body and prompt took their time: the key may be revoked now, the queue full.
        key = await keys.get(self._database, key.id)
        if (error := refusal(key)) is not None:
            raise error
        quota = await self._quotas.of(key.id)
        # From here on nothing is awaited: of requests that come together each sees the others.
        self._check(model, key)
        jobs = [under(key, job) for job in jobs]
        return self._reserve(key, quota, jobs, context, counted)

    def _reserve(
        self, key: Key, quota: Quota, jobs: list[Job], context: int, counted: Entry | None
    ) -> AdmittedRequest:
        """`context` is the model's if the prompt was read, else 0."""
        model, limits = jobs[0].model, limits_of(key)
        prices = self.prices(key, model)
        explicit, tokens, cost = True, 0, 0
        if context:
            explicit = jobs[0].max_tokens is not None or jobs[0].inputs is not None
            prompt = _prompt_tokens(jobs)
            if not explicit:
                jobs = _capped(jobs, prompt, context, prices, limits, quota.unreserved(limits))
            answer = sum(self._max_tokens(job, context) for job in jobs)
            tokens, cost = prompt + answer, prices.most(prompt, answer)
        reservation = quota.reserve(
            limits, tokens=tokens, cost=cost, explicit=explicit, counted=counted
        )
        return AdmittedRequest(jobs, key, prices, reservation, self._is_elsewhere(model))

    async def headers(self, key: Key) -> dict[str, str]:
        """The `x-ratelimit-*` headers of an answer to this key."""
        return (await self._quotas.of(key.id)).headers(limits_of(key))

    async def _read(self, jobs: list[Job]) -> tuple[list[Job], int]:
        """The jobs with their prompts' tokens, and the context of the model.

        Raises NoNodesAvailable as soon as the box drains.
        """
        reading = asyncio.create_task(self._read_prompts(jobs))
        try:
            await asyncio.wait({reading, self._drain}, return_when=asyncio.FIRST_COMPLETED)
            if self.draining:
                raise draining()
            return reading.result()
        finally:
            reading.add_done_callback(ignore_exception)
            reading.cancel()

    async def _read_prompts(self, jobs: list[Job]) -> tuple[list[Job], int]:
        """Choices share their prompt, which is read once."""
        context = 0
        prompts: dict[int, Tokenized] = {}
        for job in jobs:
            if job.prompt_number not in prompts:
                prompts[job.prompt_number], found = await self.tokenizer.tokenize(job)
                context = max(context, found)
        return [job.with_prompt(prompts[job.prompt_number]) for job in jobs], context

    def _max_tokens(self, job: Job, context: int) -> int:
        """Tokens that the answer can have at most."""
        if job.prompt_estimate is not None:  # at an upstream, which knows its context
            return job.max_tokens or 0
        shifts = self._settings.config.engine.context_shift
        room = math.inf if shifts else context - job.prompt_length
        return int(max(0, min(job.max_tokens or 0, room)))

    async def _read_quota(self, key_id: str) -> Quota:
        """With the last minute's rows, so that limits outlive a restart."""
        now = now_ms()
        # Not those of the future: the clock was ahead when they were written.
        rows = await between(self._database, key_id, now - int(MINUTE * 1000), now)
        # As it is now: since the key was found, its last request may have ended.
        key = await keys.get(self._database, key_id)
        now = now_ms()
        return Quota(key.periods, [((now - at) / 1000, tokens) for at, tokens in rows])


def _capped(
    jobs: list[Job], prompt: int, context: int, prices: Prices, limits: Limits, money: int | None
) -> list[Job]:
    """With the limit that the client left to the box: what context, tpm and `money` allow."""
    longest = max(job.prompt_length for job in jobs)
    if jobs[0].prompt_estimate is not None:
        # Rather too much, and the upstream itself refuses what is too long.
        longest = min(longest, context - context // 4)
    rooms = [context - longest]
    if limits.tpm is not None:
        rooms.append((limits.tpm - prompt) // len(jobs))
    price = prices.most(0, 1)
    if money is not None and price:
        rooms.append((money - prices.most(prompt, 0)) // (price * len(jobs)))
    # At least one: a request without room for it is refused with the numbers.
    return [replace(job, max_tokens=max(1, min(rooms))) for job in jobs]


def draining() -> NoNodesAvailable:
    return NoNodesAvailable("This box is shutting down: send it elsewhere.", retry_after=5)


def _prompt_tokens(jobs: Sequence[Job]) -> int:
    """Choices share their prompt, and it is paid once."""
    prompts = {job.prompt_number: job.prompt_length for job in jobs}
    return sum(prompts.values())
