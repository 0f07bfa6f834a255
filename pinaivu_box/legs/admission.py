"""What peers may have here: places, tokens, credit, each leg once, and no prompt for nothing."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import math
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from typing import TypeVar

from pinaivu_box import amount
from pinaivu_box.errors import Conflict, RateLimited
from pinaivu_box.gateway.backend import Job
from pinaivu_box.gateway.metering import asked_text
from pinaivu_box.gateway.quota import Window
from pinaivu_box.ledger.entry import Balance
from pinaivu_box.routing.load import LoadTracker

_ASKED_AT_ONCE = 4  # tasks of a peer that are on their way here, of up to 16 MiB each
_OTHER_SECONDS = 5.0  # that a leg waits for another of its request
_REMEMBERED = 4096  # prompts of a peer, and its legs
_COUNTED = 2  # times its tokens a minute that a peer may have counted

T = TypeVar("T")


@dataclass(frozen=True)
class PeerLimits:
    """`max_parallel` requests at a time, tokens in any minute (None: no limit), `credit` (10^-9 of
    the currency, None: no limit) that the peer may owe; beyond it, it is served while nobody else
    is, if `idle_beyond`.  `models` are globs, `hours` as "18:00-08:00" in local time."""

    max_parallel: int = 8
    tokens_per_minute: int | None = None
    credit: int | None = None
    idle_beyond: bool = True
    models: tuple[str, ...] = ("*",)
    hours: str = ""
    blocked: str | None = None

    @property
    def limited(self) -> bool:
        """Whether it matters how much a request may use: only then its prompt is counted first."""
        return self.credit is not None or self.tokens_per_minute is not None

    @property
    def open(self) -> bool:
        """Whether it is between the two times of day; always, if there are none."""
        if not self.hours:
            return True
        begin, end = self.hours.split("-")
        now = datetime.now().strftime("%H:%M")
        return begin <= now < end if begin <= end else now >= begin or now < end

    def why_not(self) -> str | None:
        """Why the peer gets nothing at all now, in a sentence for it, or None."""
        if self.blocked is not None:
            return f"This box serves yours nothing now: {self.blocked}."
        return None if self.open else f"This box serves others from {self.hours} only."


@dataclass
class PeerUse:
    """What one peer has now.  `legs`: request id, leg and choice of those that run, `served` of the
    latest that have run; `held` is what those that run may cost, and `ended` counts those whose
    cost is in the ledger instead.  `tokens` of the last minute (once they are `loaded`), `counted`
    those of prompts that were only read.  `paid`: prompts that a leg pays for.  `asking`: held
    while a task is read."""

    running: int = 0
    held: int = 0
    ended: int = 0
    loaded: bool = False
    tokens: Window = field(default_factory=Window)
    counted: Window = field(default_factory=Window)
    asking: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(_ASKED_AT_ONCE))
    legs: set[tuple[str, int, int]] = field(default_factory=set)
    served: OrderedDict[tuple[str, int, int], None] = field(default_factory=OrderedDict)
    paid: OrderedDict[bytes, None] = field(default_factory=OrderedDict)


@dataclass(frozen=True)
class LegPermit:
    """For one leg.  `fresh` raises Conflict if it was served already: nothing may be said before
    that, but the engine need not wait for it.  `proven` is called when the peer has got its proof,
    `served` when it is in the ledger.  `paid` raises Conflict if nobody pays for its prompt any
    more: nothing that was made of it may be given away before that."""

    fresh: Callable[[], Awaitable[None]]
    paid: Callable[[], None]
    proven: Callable[[], None]
    served: Callable[[], None]


@dataclass(frozen=True)
class PeerDebt:
    """What a peer owes, in 10^-9: all in all with what runs, and what of that it has not
    accepted."""

    total: int
    unaccepted: int


class PeerQuotas:
    """`terms` are asked for each request; `owed` (by peer and currency), `served` (by peer, request
    id, leg and choice) and `lately` (how many seconds ago which tokens were served to a peer in the
    last minute) are the ledger's."""

    def __init__(
        self,
        terms: Callable[[str], Awaitable[PeerLimits]],
        owed: Callable[[str, str], Awaitable[Balance]],
        served: Callable[[str, str, int, int], Awaitable[bool]],
        lately: Callable[[str], Awaitable[list[tuple[float, int]]]],
        load: LoadTracker,
    ) -> None:
        self.terms = terms
        self._owed, self._served, self._lately, self._load = owed, served, lately, load
        self._uses: dict[str, PeerUse] = {}
        self.gone = asyncio.Event()  # set while no request of a peer runs
        self.gone.set()

    def use(self, peer: str) -> PeerUse:
        return self._uses.setdefault(peer, PeerUse())

    async def _load_tokens(self, peer: str) -> None:
        """What the peer used in the last minute outlives a restart."""
        use = self.use(peer)
        if not use.loaded:
            found = await self._lately(peer)
            if not use.loaded:
                use.loaded, now = True, time.monotonic()
                for age, tokens in found:
                    use.tokens.enter(now - age, tokens)

    async def owes(self, peer: str, currency: str) -> PeerDebt:
        """As a credit limit counts it."""
        use = self.use(peer)
        while True:
            ended = use.ended
            found = await self._owed(peer, currency)
            if use.ended == ended:  # else one of them may be neither in the ledger nor held
                return PeerDebt(found.credit_used + use.held, found.waiting)

    async def check(self, peer: str, terms: PeerLimits, currency: str) -> None:
        """Before anything is spent on a request.  Raises RateLimited."""
        if terms.tokens_per_minute is not None:
            await self._load_tokens(peer)
            self._check_tokens(peer, terms, 1)
        await self._check_credit(peer, terms, currency)

    async def _check_credit(self, peer: str, terms: PeerLimits, currency: str) -> None:
        if terms.credit is None:
            return
        owed = await self.owes(peer, currency)
        if owed.total < terms.credit or (terms.idle_beyond and self._load.idle):
            return
        running = self.use(peer).held
        parts = [f"{amount.to_text(running)} of it for what runs"] if running else []
        if owed.unaccepted:
            parts.append(f"{amount.to_text(owed.unaccepted)} of it not accepted by yours")
        more = f" ({', '.join(parts)})" if parts else ""
        todo = "settle, or wait until it has nothing else to do"
        if not terms.idle_beyond:
            todo = "settle" + (", or wait until that has ended" if running else "")
        raise RateLimited(
            f"Your box owes this one {amount.to_text(owed.total)} {currency} of at most "
            f"{amount.to_text(terms.credit)}{more}: {todo}.",
            retry_after=30,
        )

    def _check_tokens(self, peer: str, terms: PeerLimits, tokens: int) -> None:
        limit = terms.tokens_per_minute
        if limit is not None:
            wait = self.use(peer).tokens.wait(time.monotonic(), min(tokens, limit), limit)
            _refuse(wait, f"Your box may use {limit} tokens a minute here")

    @contextlib.contextmanager
    def place(self, peer: str, terms: PeerLimits) -> Iterator[None]:
        """Among the peer's requests.  Raises RateLimited."""
        use = self.use(peer)
        if use.running >= terms.max_parallel:
            raise RateLimited(
                f"Your box has {use.running} requests here, as many as it may: try again when one "
                "has ended."
            )
        use.running += 1
        self.gone.clear()
        try:
            yield
        finally:
            use.running -= 1
            if not any(one.running for one in self._uses.values()):
                self.gone.set()

    @contextlib.asynccontextmanager
    async def reserved(
        self, peer: str, terms: PeerLimits, currency: str, ceiling: int, tokens: int
    ) -> AsyncIterator[Callable[[int], None]]:
        """What a request may cost and use at most, until it ends: then its cost must be in the
        ledger.  Call what it gives with the tokens that were really used.  Raises RateLimited."""
        await self._check_credit(peer, terms, currency)
        # From here on nothing is waited for: of requests that come together each sees the others.
        self._check_tokens(peer, terms, tokens)
        use = self.use(peer)
        entry = use.tokens.enter(time.monotonic(), min(tokens, terms.tokens_per_minute or tokens))
        use.held += ceiling
        try:
            yield lambda used: use.tokens.correct(entry, used, time.monotonic())
        finally:
            use.held, use.ended = use.held - ceiling, use.ended + 1

    def counting(self, peer: str, terms: PeerLimits) -> Callable[[int], None]:
        """For a prompt that is read and not run; call what it gives with its tokens.  Raises
        RateLimited."""
        use, now = self.use(peer), time.monotonic()
        if terms.tokens_per_minute is not None:
            limit = _COUNTED * terms.tokens_per_minute
            _refuse(use.counted.wait(now, 1, limit), f"Your box may count {limit} tokens a minute")

        def counted(tokens: int) -> None:
            use.counted.enter(time.monotonic(), tokens)

        return counted

    @contextlib.asynccontextmanager
    async def once(self, peer: str, job: Job, *, pays: bool) -> AsyncIterator[LegPermit]:
        """A leg is served once, for the ledger counts it once; and one of those that share a prompt
        pays for it, if it comes to a proof.  Raises Conflict."""
        use, leg = self.use(peer), (job.request_id, job.leg, job.choice)
        if leg in use.served:
            raise _served_already()
        # One whose stream has just broken is about to end.
        if not await _comes(lambda: leg not in use.legs):
            raise Conflict("This leg of the request is being served already.")
        use.legs.add(leg)

        async def fresh() -> None:
            if await self._served(peer, *leg):
                _remember(use.served, leg)  # the next time nothing begins
                raise _served_already()

        try:
            prompt = _prompt(job)

            def paid() -> None:
                if prompt not in use.paid:
                    raise _unpaid()

            async with _payment(use, prompt, pays=pays) as proven:
                yield LegPermit(fresh, paid, proven, lambda: _remember(use.served, leg))
        finally:
            use.legs.discard(leg)


@contextlib.asynccontextmanager
async def _payment(use: PeerUse, prompt: bytes, *, pays: bool) -> AsyncIterator[Callable[[], None]]:
    # The leg that pays may have been overtaken.
    if not (pays or await _comes(lambda: prompt in use.paid)):
        raise _unpaid()
    proven = prompt in use.paid or not pays

    def prove() -> None:
        nonlocal proven
        proven = True

    _remember(use.paid, prompt)
    try:
        yield prove
    finally:
        if not proven:
            use.paid.pop(prompt, None)


def _remember(kept: OrderedDict[T, None], one: T) -> None:
    kept[one] = None
    if len(kept) > _REMEMBERED:
        kept.popitem(last=False)


def _served_already() -> Conflict:
    return Conflict("This leg of the request was served already.")


def _unpaid() -> Conflict:
    return Conflict("Nobody pays for the prompt of this request here.")


def _refuse(wait: float, limit: str) -> None:
    if wait > 0:
        seconds = 60 if wait == math.inf else max(1, math.ceil(wait))
        raise RateLimited(f"{limit}: try again in {seconds} s.", retry_after=seconds)


async def _comes(true: Callable[[], bool]) -> bool:
    """Whether it becomes true soon."""
    until = time.monotonic() + _OTHER_SECONDS
    while not true() and time.monotonic() < until:  # noqa: ASYNC110, it nearly always is
        await asyncio.sleep(0.05)
    return true()


def _prompt(job: Job) -> bytes:
    """With its priority: who does not pay must not be served before who does."""
    name = f"{job.request_id} {job.prompt_number} {job.priority}\n{asked_text(job)}"
    return hashlib.sha256(name.encode()).digest()
