"""Quotas: what whoever pays for requests, a key or another box, may use, and what is in use.

All that a request needs is checked and taken in one call without an await, so requests that come
together see each other.  What is reserved counts at once, and is corrected to what was really used
when the request ends.  Pure, but for a clock.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field

from pinaivu_box import amount
from pinaivu_box.errors import BudgetExceeded, ExceedsKeyLimit, RateLimited
from pinaivu_box.policy import Budget
from pinaivu_box.store.keys import MAX_PERIODS, in_period
from pinaivu_box.text import utc_text

MINUTE = 60.0  # seconds
_CREDIT_RETRY_SECONDS = 30
_MAX_QUOTAS = 10_000  # beyond these, the idle ones are forgotten and read from the store again


@dataclass(slots=True, eq=False)
class Entry:
    """An amount in a window."""

    window: Window
    at: float
    amount: int

    @property
    def counts(self) -> bool:
        """Whether it is of the last minute."""
        return self.at + MINUTE > self.window.now()

    def correct(self, amount: int) -> None:
        """Count `amount` instead of what was entered."""
        if self.counts:
            self.window.total += amount - self.amount
            self.amount = amount


class Window:
    """The sum of the amounts of the last minute: an exact sliding window.

    What is entered at t counts at every moment before t + 60 s.  `now` is a monotonic clock.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self.now = now
        self.total = 0  # of the entries
        self._entries: deque[Entry] = deque()  # oldest first

    @property
    def used(self) -> int:
        self._forget_old()
        return self.total

    def enter(self, amount: int, *, age: float = 0.0) -> Entry:
        """Count `amount`, as if it had come `age` seconds ago."""
        self._forget_old()  # without a limit, nobody asks what is used
        entry = Entry(self, self.now() - age, amount)
        self._entries.append(entry)
        self.total += amount
        return entry

    def _forget_old(self) -> None:
        while self._entries and not self._entries[0].counts:
            self.total -= self._entries.popleft().amount

    def wait(self, amount: int, limit: int) -> float:
        """Seconds until `amount` more stay within the limit; infinite if they never do."""
        excess = self.used + amount - limit
        if excess <= 0:
            return 0.0
        for entry in self._entries:
            excess -= entry.amount
            if excess <= 0:
                return min(entry.at + MINUTE - self.now(), MINUTE)
        return math.inf

    @property
    def empty_in(self) -> float:
        """Seconds until nothing is left in it."""
        return max(0.0, self._entries[-1].at + MINUTE - self.now()) if self._entries else 0.0


@dataclass(frozen=True)
class Credit:
    """What a peer may owe, and owes by the ledger, in 10^-9 of the currency.

    `unaccepted` is the part that it has not signed.  Beyond its credit it is served while this box
    has nothing else to do, if `if_idle`: `waived` says that this is so now.
    """

    limit: int
    owed: int
    unaccepted: int
    currency: str
    if_idle: bool
    waived: bool


@dataclass(frozen=True)
class Limits:
    """What a principal may use; None is no limit.

    `principal` is how sentences to it begin: "The key sk-pnv-abc...", "Your box".  The other names
    are those of `policy.Policy`; periods of the `budget` are counted from `budget_since` (Unix
    milliseconds).
    """

    principal: str
    rpm: int | None = None
    tpm: int | None = None
    max_parallel: int | None = None
    max_queue: int = 0
    budget: Budget | None = None
    budget_since: int = 0
    credit: Credit | None = None


@dataclass
class Spending:
    """In 10^-9 of the currency: what is spent, and what running requests may cost at most."""

    spent: int = 0
    reserved: int = 0


@dataclass(eq=False)
class Reservation:
    """What one request has taken of a quota.

    It may run once `turn` is set; `ahead` requests wait before it.  `period` is that of the budget,
    and what the request costs is counted there.  `end` it in any case.
    """

    quota: Quota
    period: int
    spending: Spending
    tokens: Entry
    cost: int
    turn: asyncio.Event = field(default_factory=asyncio.Event)
    ahead: int = 0

    def end(self, tokens: int, cost: int) -> None:
        """The request has ended, and has used and cost so much."""
        self.tokens.correct(tokens)
        self.quota.end(self, cost)


class Quota:
    """What one principal uses now.

    Money is counted by the period of the budget that a request came in, for the clock may jump to
    another period and come back.
    """

    def __init__(
        self,
        spent: Mapping[int, int] | None = None,
        recent: Iterable[tuple[float, int]] = (),
        *,
        now: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        """Take up what the store knows.

        `spent` is by the beginning of the period (Unix milliseconds), the latest last.  `recent`
        has age (seconds) and tokens of each request of the last minute, the oldest first.  `now`
        is a monotonic clock, `wall` Unix seconds.
        """
        self.requests = Window(now)
        self.tokens = Window(now)
        self.running = 0
        self.ended = 0  # requests, since this quota was read
        self._wall = wall
        self._spending = {begin: Spending(units) for begin, units in (spent or {0: 0}).items()}
        self._max_parallel: int | None = None  # as it was last seen
        self._waiting: deque[Reservation] = deque()
        for age, tokens in recent:
            self.requests.enter(1, age=max(0.0, age))
            self.tokens.enter(tokens, age=max(0.0, age))

    # -- what is in use ----------------------------------------------------------------------------

    @property
    def reserved(self) -> int:
        """What running requests may cost at most, in 10^-9 of the currency."""
        return sum(spending.reserved for spending in self._spending.values())

    @property
    def idle(self) -> bool:
        """Whether the store knows all of it: refused requests of the last minute are in no row."""
        return not (self.running or self._waiting or self.requests.used)

    def headers(self, limits: Limits) -> dict[str, str]:
        """OpenAI's `x-ratelimit-*` headers, of the limits that there are."""
        headers = {}
        windows = (("requests", limits.rpm, self.requests), ("tokens", limits.tpm, self.tokens))
        for name, limit, window in windows:
            if limit is not None:
                headers[f"x-ratelimit-limit-{name}"] = str(limit)
                headers[f"x-ratelimit-remaining-{name}"] = str(max(0, limit - window.used))
                headers[f"x-ratelimit-reset-{name}"] = f"{window.empty_in:.3f}s"
        return headers

    def unreserved(self, limits: Limits) -> int | None:
        """What is left of the budget if no request holds any of it, else None.

        An answer without a limit of its own is cut where that is used up.
        """
        if limits.budget is None:
            return None
        spending = self._spending_of(*self._period(limits))
        return None if spending.reserved else max(0, limits.budget.units - spending.spent)

    # -- a request ---------------------------------------------------------------------------------

    def count_request(self, limits: Limits) -> Entry:
        """Take one request of the minute, before the body is read.

        Pass the entry to `reserve`.  Raises RateLimited.
        """
        self._check_requests(limits, None)
        return self.requests.enter(1)

    def check(
        self,
        limits: Limits,
        *,
        tokens: int = 1,
        cost: int = 0,
        explicit: bool = True,
        counted: Entry | None = None,
    ) -> None:
        """Refuse a request that cannot run now; the parameters are those of `reserve`."""
        self._max_parallel = limits.max_parallel
        self._check_requests(limits, counted)
        self._check_tokens(limits, tokens)
        self._check_places(limits)
        self._check_money(limits, cost, explicit=explicit)

    def reserve(
        self,
        limits: Limits,
        *,
        tokens: int = 0,
        cost: int = 0,
        explicit: bool = True,
        counted: Entry | None = None,
    ) -> Reservation:
        """Take all that a request may use at most, or nothing.

        `cost` is in 10^-9 of the currency; `explicit` says that the client has set the limit of its
        answer.  A request that is `counted` already counts from now on instead.  Raises
        ExceedsKeyLimit, RateLimited if it would fit later, BudgetExceeded if it would not.
        """
        self.check(limits, tokens=tokens, cost=cost, explicit=explicit, counted=counted)
        if counted is not None:
            counted.correct(0)
        self.requests.enter(1)
        period, _ = self._period(limits)
        spending = self._charged(period)
        spending.reserved += cost
        reservation = Reservation(self, period, spending, self.tokens.enter(tokens), cost)
        self._waiting.append(reservation)
        self._let_run()
        reservation.ahead = len(self._waiting)
        return reservation

    def increase(self, reservation: Reservation, limits: Limits, *, tokens: int, cost: int) -> None:
        """Reserve more for a request that has its place already.  Raises as `reserve` does."""
        self._check_tokens(limits, tokens)
        self._check_money(limits, cost, explicit=True)
        reservation.tokens = self.tokens.enter(tokens)
        reservation.spending.reserved += cost
        reservation.cost += cost

    def end(self, reservation: Reservation, cost: int) -> None:
        """The request has ended, and has cost so much; the next that waits may run."""
        reservation.spending.reserved -= reservation.cost
        reservation.spending.spent += cost
        if reservation.turn.is_set():
            self.running -= 1
        else:
            self._waiting.remove(reservation)
        self.ended += 1
        self._let_run()

    def _has_place(self) -> bool:
        return self._max_parallel is None or self.running < self._max_parallel

    def _let_run(self) -> None:
        """Those that wait and have a place now, in the order in which they came."""
        while self._waiting and self._has_place():
            self.running += 1
            self._waiting.popleft().turn.set()

    # -- checks ------------------------------------------------------------------------------------

    def _check_requests(self, limits: Limits, counted: Entry | None) -> None:
        """A request that is counted is not in its own way."""
        if limits.rpm is not None:
            more = 0 if counted is not None and counted.counts else 1
            wait = self.requests.wait(more, limits.rpm)
            refuse_until(
                wait, f"{limits.principal} may make {limits.rpm} requests per minute (rpm)"
            )

    def _check_tokens(self, limits: Limits, tokens: int) -> None:
        if limits.tpm is None:
            return
        wait = self.tokens.wait(tokens, limits.tpm)
        if wait == math.inf:
            raise ExceedsKeyLimit(
                f"{limits.principal} may use {limits.tpm} tokens per minute (tpm), and this "
                f"request may use {tokens}: lower max_tokens or shorten the prompt."
            )
        size = f"tpm; this request may use {tokens}"
        refuse_until(wait, f"{limits.principal} may use {limits.tpm} tokens per minute ({size})")

    def _check_places(self, limits: Limits) -> None:
        if not self._has_place() and len(self._waiting) >= limits.max_queue:
            queue = f" and {limits.max_queue} that wait (max_queue)" if limits.max_queue else ""
            raise RateLimited(
                f"{limits.principal} may have {limits.max_parallel} requests at a time "
                f"(max_parallel){queue}: try again when one has ended."
            )

    def _check_money(self, limits: Limits, cost: int, *, explicit: bool) -> None:
        if limits.budget is not None:
            self._check_budget(limits, limits.budget, cost, explicit)
        if limits.credit is not None:
            self._check_credit(limits, limits.credit)

    def _check_budget(self, limits: Limits, budget: Budget, cost: int, explicit: bool) -> None:
        begin, end = self._period(limits)
        spending = self._spending_of(begin, end)
        left = budget.units - spending.spent
        if cost > left and (explicit or not spending.reserved):
            when = (
                "raise the budget"
                if end is None
                else f"wait until {utc_text(math.ceil(end / 1000))}"
            )
            period = f" per {budget.period}" if budget.period else ""
            raise BudgetExceeded(
                f"{limits.principal} has a budget of {budget.amount}{period}, of which "
                f"{amount.to_text(spending.spent)} is spent, and this request may cost "
                f"{amount.to_text(cost)}: {when if left <= 0 else f'lower max_tokens, or {when}'}."
            )
        if cost > left - spending.reserved:
            raise RateLimited(
                f"{limits.principal} has running requests that may use up its budget "
                f"({amount.to_text(left)} is left): try again when one has ended."
            )

    def _check_credit(self, limits: Limits, credit: Credit) -> None:
        running = self.reserved
        if credit.owed + running < credit.limit or credit.waived:
            return
        parts = [f"{amount.to_text(running)} of it for running requests"] if running else []
        if credit.unaccepted:
            parts.append(f"{amount.to_text(credit.unaccepted)} of it not accepted by your box")
        detail = f" ({', '.join(parts)})" if parts else ""
        action = "settle, or wait until it has nothing else to do"
        if not credit.if_idle:
            action = "settle" + (", or wait until those have ended" if running else "")
        raise RateLimited(
            f"{limits.principal} owes this one {amount.to_text(credit.owed + running)} "
            f"{credit.currency} of at most {amount.to_text(credit.limit)}{detail}: {action}.",
            retry_after=_CREDIT_RETRY_SECONDS,
        )

    # -- periods of a budget -----------------------------------------------------------------------

    def _period(self, limits: Limits) -> tuple[int, int | None]:
        """The present period of the budget: when it began and ends, Unix milliseconds.

        Without a budget the last one goes on.
        """
        if limits.budget is None:
            return next(reversed(self._spending)), None
        return limits.budget.window(limits.budget_since, round(self._wall() * 1000))

    def _spending_of(self, begin: int, end: int | None) -> Spending:
        """All that is of a period; there are several if the budget had a shorter one before."""
        parts = [part for at, part in self._spending.items() if in_period(at, begin, end)]
        return Spending(sum(part.spent for part in parts), sum(part.reserved for part in parts))

    def _charged(self, period: int) -> Spending:
        """Where what a request of that period costs is counted."""
        spending = self._spending.pop(period, Spending())
        for old in list(self._spending)[: max(0, len(self._spending) - MAX_PERIODS)]:
            if not self._spending[old].reserved:
                del self._spending[old]
        self._spending[period] = spending  # the latest used come last
        return spending


class Quotas:
    """The quotas of principals, by id.

    Each is read from the store when it is first used, so that limits outlive a restart.
    """

    def __init__(self, read: Callable[[str], Awaitable[Quota]]) -> None:
        self._read = read
        self._quotas: dict[str, Quota] = {}
        self._reading = asyncio.Lock()

    async def of(self, principal: str) -> Quota:
        quota = self._quotas.get(principal)
        if quota is not None:
            return quota
        async with self._reading:
            if principal not in self._quotas:
                if len(self._quotas) >= _MAX_QUOTAS:
                    self._quotas = {id_: q for id_, q in self._quotas.items() if not q.idle}
                self._quotas[principal] = await self._read(principal)
            return self._quotas[principal]


def refuse_until(wait: float, limit: str) -> None:
    """Raise RateLimited with the sentence `limit` if it is to be waited for so many seconds."""
    if wait > 0:
        seconds = max(1, math.ceil(wait))
        raise RateLimited(f"{limit}: try again in {seconds} s.", retry_after=seconds)
