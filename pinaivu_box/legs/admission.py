"""Admission of peers' legs: what a peer may use, each leg once, and no prompt for nothing."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

from msgspec.structs import asdict

from pinaivu_box import amount
from pinaivu_box.bounded import BoundedDict
from pinaivu_box.changes import Changes
from pinaivu_box.errors import Conflict
from pinaivu_box.gateway.backend import Job, asked_text
from pinaivu_box.gateway.quota import (
    Credit,
    Limits,
    Quota,
    Quotas,
    Reservation,
    Window,
    refuse_until,
)
from pinaivu_box.ledger.entry import Balance
from pinaivu_box.legs.recorder import LedgerRecorder
from pinaivu_box.policy import PeerPolicy
from pinaivu_box.routing.load import LoadTracker
from pinaivu_box.settings import LiveSettings
from pinaivu_box.store import peer_settings
from pinaivu_box.store.database import Database
from pinaivu_box.store.peer_settings import PeerLimits

_MAX_RECEIVING = 4  # tasks of a peer that are on their way here, of up to 16 MiB each
_SIBLING_SECONDS = 5.0  # that a leg waits for another of its request
_MAX_REMEMBERED = 4096  # prompts of a peer, and legs
_COUNTED_RATIO = 2  # of the tokens a minute that a peer may have counted to those it may use
_PRINCIPAL = "Your box"  # as sentences to a peer begin
_SERVED_ALREADY = "This leg of the request was served already."
_UNPAID = "No leg of this request pays for its prompt here."

LegKey = tuple[str, int, int]  # request id, leg, choice


class PeerPolicies:
    """What each peer may have, kept in memory since each request asks for it."""

    def __init__(self, database: Database, settings: LiveSettings) -> None:
        self._database, self._settings = database, settings
        self._limits: dict[str, PeerLimits] = {}

    async def of(self, node_id: str) -> PeerPolicy:
        """`[peering.serve]`, and what is set for that peer instead."""
        limits = self._limits  # what is read now is of no use after a change
        if node_id not in limits:
            limits[node_id] = await peer_settings.limits_of(self._database, node_id)
        own = {name: v for name, v in asdict(limits[node_id]).items() if v is not None}
        return PeerPolicy(**{**asdict(self._settings.config.peering.serve), **own})

    def changed(self) -> None:
        """The store has other settings now."""
        self._limits = {}


@dataclass(frozen=True)
class PeerDebt:
    """What a peer owes, in 10^-9 of the currency: with what runs, and what it has not accepted."""

    total: int
    unaccepted: int


class _PeerLegs:
    """The legs of one peer, and the tokens of prompts that were only counted."""

    def __init__(self) -> None:
        self.receiving = asyncio.Semaphore(_MAX_RECEIVING)  # held while a task is read
        self.counted = Window()
        self.running: set[LegKey] = set()
        self.served: BoundedDict[LegKey, None] = BoundedDict(_MAX_REMEMBERED)  # the latest
        self.paid: BoundedDict[bytes, None] = BoundedDict(_MAX_REMEMBERED)  # prompts, by a leg
        self.changes = Changes()  # of `running` and `paid`


@dataclass
class LegPermit:
    """Permission to serve one leg, while it lasts.  `proven`: the peer has its proof."""

    peer: str
    key: LegKey
    prompt: bytes
    legs: _PeerLegs
    ledger: LedgerRecorder
    proven: bool = False

    async def check_new(self) -> None:
        """Nothing may be sent before this, but the engine need not wait for it.

        Raises Conflict if the leg was served already.
        """
        if await self.ledger.served(self.peer, *self.key):
            self.served()  # the next time nothing begins
            raise Conflict(_SERVED_ALREADY)

    def check_paid(self) -> None:
        """Nothing that was computed may be sent before this.

        Raises Conflict if no leg pays for the prompt any more.
        """
        if self.prompt not in self.legs.paid:
            raise Conflict(_UNPAID)

    def served(self) -> None:
        """It is in the ledger."""
        self.legs.served[self.key] = None


@dataclass(frozen=True)
class PeerRequest:
    """A request of a peer that has its place among the peer's requests."""

    admission: LegAdmission
    peer: str
    policy: PeerPolicy
    currency: str
    reservation: Reservation
    counted: Window  # the tokens of the peer's prompts that were only counted

    async def check(self) -> None:
        """Refuse what cannot run before anything is spent on it.  Raises RateLimited."""
        self.reservation.quota.check(await self._limits())

    async def reserve(self, *, tokens: int, cost: int) -> None:
        """Reserve what the request may use and cost at most, until it ends.

        Raises RateLimited.
        """
        limits = await self._limits()
        # From here on nothing is awaited: of requests that come together each sees the others.
        tokens = min(tokens, limits.tpm or tokens)
        self.reservation.quota.increase(self.reservation, limits, tokens=tokens, cost=cost)

    def check_counting(self) -> None:
        """Before a prompt is counted that is not run.  Raises RateLimited."""
        if self.policy.tokens_per_minute:
            limit = _COUNTED_RATIO * self.policy.tokens_per_minute
            wait = self.counted.wait(1, limit)
            refuse_until(wait, f"{_PRINCIPAL} may count {limit} tokens per minute")

    async def _limits(self) -> Limits:
        """What the peer may use now, but for places: it has one from the beginning."""
        policy, credit = self.policy, None
        if policy.credit_limit:
            balance = await self.admission.balance(self.peer, self.currency)
            if_idle = policy.beyond == "idle"
            credit = Credit(
                amount.parse(policy.credit_limit),
                balance.credit_used,
                balance.waiting,
                self.currency,
                if_idle,
                waived=if_idle and self.admission.load.idle,
            )
        return Limits(_PRINCIPAL, tpm=policy.tokens_per_minute or None, credit=credit)


class LegAdmission:
    """Decides which legs of peers are served, and counts what peers use."""

    def __init__(
        self,
        policy: Callable[[str], Awaitable[PeerPolicy]],
        ledger: LedgerRecorder,
        load: LoadTracker,
    ) -> None:
        """`policy` says what a peer may have."""
        self.policy = policy
        self.quotas = Quotas(self._read_quota)
        self.idle = asyncio.Event()  # set while no request of a peer runs
        self.idle.set()
        self.load = load
        self._ledger = ledger
        self._running = 0
        self._legs: defaultdict[str, _PeerLegs] = defaultdict(_PeerLegs)

    async def _read_quota(self, peer: str) -> Quota:
        return Quota(recent=await self._ledger.recent(peer))

    def receiving(self, peer: str) -> asyncio.Semaphore:
        """Bounds the tasks of a peer that are read at a time."""
        return self._legs[peer].receiving

    # -- what a peer may use -----------------------------------------------------------------------

    async def debt(self, peer: str, currency: str) -> PeerDebt:
        """As a credit limit counts it."""
        balance = await self.balance(peer, currency)
        reserved = (await self.quotas.of(peer)).reserved
        return PeerDebt(balance.credit_used + reserved, balance.waiting)

    async def balance(self, peer: str, currency: str) -> Balance:
        """As the ledger has it when no leg of the peer ends meanwhile."""
        quota = await self.quotas.of(peer)
        while True:
            ended = quota.ended
            balance = await self._ledger.balance(peer, currency)
            if quota.ended == ended:
                return balance
            # A leg that has ended meanwhile may be neither in the balance nor reserved.

    @contextlib.asynccontextmanager
    async def request(
        self, peer: str, policy: PeerPolicy, currency: str
    ) -> AsyncIterator[PeerRequest]:
        """A place among the peer's requests, until the request has ended.

        What it cost must be in the ledger by then.  Raises RateLimited.
        """
        quota = await self.quotas.of(peer)
        reservation = quota.reserve(Limits(_PRINCIPAL, max_parallel=policy.max_parallel))
        self._running += 1
        self.idle.clear()
        try:
            yield PeerRequest(self, peer, policy, currency, reservation, self._legs[peer].counted)
        finally:
            quota.end(reservation, 0)  # what it has cost is in the ledger
            self._running -= 1
            if not self._running:
                self.idle.set()

    # -- legs --------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def leg(self, peer: str, job: Job, *, pays: bool) -> AsyncIterator[LegPermit]:
        """Serve a leg once, for the ledger counts it once; and of those that share a prompt one
        pays for it, if it comes to a proof.

        Raises Conflict.
        """
        legs, key = self._legs[peer], (job.request_id, job.leg, job.choice)
        if key in legs.served:
            raise Conflict(_SERVED_ALREADY)
        # One whose stream has just broken is about to end.
        if not await legs.changes.until(lambda: key not in legs.running, _SIBLING_SECONDS):
            raise Conflict("This leg of the request is being served already.")
        legs.running.add(key)
        try:
            prompt = _prompt_hash(job)
            # The leg that pays may have been overtaken.
            if not (
                pays or await legs.changes.until(lambda: prompt in legs.paid, _SIBLING_SECONDS)
            ):
                raise Conflict(_UNPAID)
            paid_before = prompt in legs.paid or not pays
            legs.paid[prompt] = None
            legs.changes.notify()
            permit = LegPermit(peer, key, prompt, legs, self._ledger)
            try:
                yield permit
            finally:
                if not (paid_before or permit.proven):
                    legs.paid.pop(prompt, None)
        finally:
            legs.running.discard(key)
            legs.changes.notify()


def _prompt_hash(job: Job) -> bytes:
    """With its priority: who does not pay must not be served before who does."""
    name = f"{job.request_id} {job.prompt_number} {job.priority}\n{asked_text(job)}"
    return hashlib.sha256(name.encode()).digest()
