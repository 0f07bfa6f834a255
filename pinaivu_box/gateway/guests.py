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

from pinaivu_box import amount
from pinaivu_box.errors import Conflict, RateLimited
from pinaivu_box.gateway.backend import Job
from pinaivu_box.gateway.limits import Window
from pinaivu_box.gateway.load import Load
from pinaivu_box.gateway.metering import asked_text

_ASKED_AT_ONCE = 4  # tasks of a peer that are on their way here, of up to 16 MiB each
_OTHER_SECONDS = 5.0  # that a leg waits for another of its request
_PAID = 4096  # prompts of a peer that are remembered


@dataclass(frozen=True)
class Terms:
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
class Use:
    """What one peer has now.  `legs`: request id, leg and choice of those that run; `held` is what
    they may cost.  `paid`: prompts that a leg pays for.  `asking`: held while a task is read."""

    running: int = 0
    held: int = 0
    tokens: Window = field(default_factory=Window)
    asking: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(_ASKED_AT_ONCE))
    legs: set[tuple[str, int, int]] = field(default_factory=set)
    paid: OrderedDict[bytes, None] = field(default_factory=OrderedDict)


@dataclass(frozen=True)
class Pass:
    """For one leg.  `fresh` raises Conflict if it was served already: nothing may be said before
    that, but the engine need not wait for it.  `proven` is called when it comes to a proof."""

    fresh: Callable[[], Awaitable[None]]
    proven: Callable[[], None]


class Guests:
    """`terms` are asked for each request; `owed` (10^-9, by peer and currency) and `served` (by
    peer, request id, leg and choice) are the ledger's."""

    def __init__(
        self,
        terms: Callable[[str], Awaitable[Terms]],
        owed: Callable[[str, str], Awaitable[int]],
        served: Callable[[str, str, int, int], Awaitable[bool]],
        load: Load,
    ) -> None:
        self.terms = terms
        self._owed, self._served, self._load = owed, served, load
        self._uses: dict[str, Use] = {}
        self.gone = asyncio.Event()  # set while no request of a peer runs
        self.gone.set()

    def use(self, peer: str) -> Use:
        return self._uses.setdefault(peer, Use())

    async def owes(self, peer: str, currency: str) -> int:
        """As a credit limit counts it: with what runs."""
        return await self._owed(peer, currency) + self.use(peer).held

    async def check_credit(self, peer: str, terms: Terms, currency: str) -> None:
        """Raises RateLimited."""
        if terms.credit is None:
            return
        owed = await self.owes(peer, currency)
        if owed < terms.credit or (terms.idle_beyond and self._load.idle):
            return
        raise RateLimited(
            f"Your box owes this one {amount.to_text(owed)} {currency} of at most "
            f"{amount.to_text(terms.credit)}: settle, or wait until it has nothing else to do.",
            retry_after=30,
        )

    @contextlib.contextmanager
    def place(
        self, peer: str, terms: Terms, ceiling: int = 0, tokens: int = 0
    ) -> Iterator[Callable[[int], None]]:
        """Among the peer's requests; call what it gives with the tokens that were really used.
        Raises RateLimited."""
        use = self.use(peer)
        if use.running >= terms.max_parallel:
            raise RateLimited(
                f"Your box has {use.running} requests here, as many as it may: try again when one "
                "has ended."
            )
        now, limit = time.monotonic(), terms.tokens_per_minute
        if limit is not None:
            tokens = min(tokens, limit)
            if wait := use.tokens.wait(now, tokens, limit):
                raise RateLimited(
                    f"Your box may use {limit} tokens a minute here: try again in {wait:.0f} s.",
                    retry_after=max(1, math.ceil(wait)),
                )
        entry = use.tokens.enter(now, tokens)
        use.running, use.held = use.running + 1, use.held + ceiling
        self.gone.clear()
        try:
            yield lambda used: use.tokens.correct(entry, used, time.monotonic())
        finally:
            use.running, use.held = use.running - 1, use.held - ceiling
            if not any(one.running for one in self._uses.values()):
                self.gone.set()

    @contextlib.asynccontextmanager
    async def once(self, peer: str, job: Job, *, pays: bool) -> AsyncIterator[Pass]:
        """A leg is served once, for the ledger counts it once; and one of those that share a prompt
        pays for it, if it comes to a proof.  Raises Conflict."""
        use, leg = self.use(peer), (job.request_id, job.leg, job.choice)
        # One whose stream has just broken is about to end.
        if not await _comes(lambda: leg not in use.legs):
            raise Conflict("This leg of the request is being served already.")
        use.legs.add(leg)

        async def fresh() -> None:
            if await self._served(peer, *leg):
                raise Conflict("This leg of the request was served already.")

        try:
            async with _payment(use, _prompt(job), pays=pays) as proven:
                yield Pass(fresh, proven)
        finally:
            use.legs.discard(leg)


@contextlib.asynccontextmanager
async def _payment(use: Use, prompt: bytes, *, pays: bool) -> AsyncIterator[Callable[[], None]]:
    # The leg that pays may have been overtaken.
    if not (pays or await _comes(lambda: prompt in use.paid)):
        raise Conflict("Nobody pays for the prompt of this request here.")
    proven = prompt in use.paid or not pays

    def prove() -> None:
        nonlocal proven
        proven = True

    use.paid[prompt] = None
    if len(use.paid) > _PAID:
        use.paid.popitem(last=False)
    try:
        yield prove
    finally:
        if not proven:
            use.paid.pop(prompt, None)


async def _comes(true: Callable[[], bool]) -> bool:
    """Whether it becomes true soon."""
    until = time.monotonic() + _OTHER_SECONDS
    while not true() and time.monotonic() < until:  # noqa: ASYNC110, it nearly always is
        await asyncio.sleep(0.05)
    return true()


def _prompt(job: Job) -> bytes:
    name = f"{job.request_id} {job.prompt_number}\n{asked_text(job)}"
    return hashlib.sha256(name.encode()).digest()
