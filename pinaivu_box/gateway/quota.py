"""What a key may still use: requests and tokens in any minute, places, budget.  Pure, but for a
clock.

All of a request is checked and taken in one call, so nothing can come between; what was taken is
settled to the truth when the request ends.  A budget counts what running requests may still cost.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime

from pinaivu_box import amount
from pinaivu_box.errors import BudgetExceeded, ExceedsKeyLimit, RateLimited
from pinaivu_box.policy import Policy
from pinaivu_box.store.keys import MOST_PERIODS, Key, in_period

MINUTE = 60.0


class Window:
    """Amounts of the last `seconds`: an exact sliding window, not one that starts anew at times.

    What was entered at t counts at every moment before t + seconds.
    """

    def __init__(self, seconds: float = MINUTE) -> None:
        self._seconds = seconds
        self._entries: deque[list[float]] = deque()  # [when, amount], oldest first
        self._total = 0

    def used(self, now: float) -> int:
        while self._entries and self._entries[0][0] + self._seconds <= now:
            self._total -= int(self._entries.popleft()[1])
        return self._total

    def enter(self, now: float, amount: int) -> list[float]:
        """The entry, for `correct`."""
        self.used(now)
        entry = [now, amount]
        self._entries.append(entry)
        self._total += amount
        return entry

    def correct(self, entry: list[float], truth: int, now: float) -> None:
        if entry[0] + self._seconds > now:
            self._total += truth - int(entry[1])
            entry[1] = truth

    def wait(self, now: float, amount: int, limit: int) -> float:
        """Seconds until `amount` more stay within the limit; infinite if they never do."""
        over = self.used(now) + amount - limit
        for when, entered in self._entries:
            if over <= 0:
                break
            over -= int(entered)
            if over <= 0:
                return min(when + self._seconds - now, self._seconds)
        return 0.0 if over <= 0 else math.inf

    def empty_in(self, now: float) -> float:
        """Seconds until nothing is left in it."""
        self.used(now)
        return self._entries[-1][0] + self._seconds - now if self._entries else 0.0


@dataclass
class Grant:
    """What one request has taken.  It may run once `turn` is set; end it in any case."""

    period: int
    spending: Spending
    cost: int
    entry: list[float]
    turn: asyncio.Event = field(default_factory=asyncio.Event)
    ahead: int = 0  # requests of the key that must end first


@dataclass
class Spending:
    """In one period of a budget, in 10^-9: what is spent, and what running requests may cost."""

    spent: int = 0
    held: int = 0


class KeyUse:
    """What a key uses now.  What it spends is counted by the period that the request came in, for
    the clock may jump to another period and come back."""

    def __init__(self, key: Key, ended: Iterable[tuple[float, int]], now: float) -> None:
        """`ended`: when the last minute's requests came, and their tokens."""
        self.requests = Window()
        self.tokens = Window()
        self.periods = {since: Spending(spent) for since, spent in key.periods.items()}
        self.running = 0
        self.places: int | None = None  # max_parallel, as it was last seen
        self.waiting: deque[Grant] = deque()
        self.arriving = 0
        for when, tokens in ended:
            self.requests.enter(min(when, now), 1)
            self.tokens.enter(min(when, now), tokens)

    @property
    def idle(self) -> bool:
        return not (self.running or self.waiting or self.arriving)

    def let_in(self) -> None:
        """Whoever waits and has a place now."""
        while self.waiting and (self.places is None or self.running < self.places):
            self.running += 1
            self.waiting.popleft().turn.set()

    def of(self, begin: int, end: int | None) -> Spending:
        """All that is of a period of the budget.  There are several if the budget had a shorter
        one before."""
        found = [one for since, one in self.periods.items() if in_period(since, begin, end)]
        return Spending(sum(one.spent for one in found), sum(one.held for one in found))

    def counting(self, period: int) -> Spending:
        """Where what a request of that period spends is counted."""
        made = self.periods.pop(period, Spending())
        for old in list(self.periods)[: max(0, len(self.periods) - MOST_PERIODS)]:
            if not self.periods[old].held:
                del self.periods[old]
        self.periods[period] = made  # the latest used come last
        return made


class Limits:
    """`now` is monotonic, `wall` Unix seconds."""

    def __init__(
        self, now: Callable[[], float] = time.monotonic, wall: Callable[[], float] = time.time
    ) -> None:
        self._now = now
        self._wall = wall

    def arrive(self, key: Key, use: KeyUse) -> list[float]:
        """One request of the minute, taken before its body is read; see `take` and `leave`.

        Raises RateLimited.
        """
        now = self._now()
        self._check_requests(key, use, now)
        return use.requests.enter(now, 1)

    def leave(self, use: KeyUse, arrived: list[float]) -> None:
        """The request is not counted after all."""
        use.requests.correct(arrived, 0, self._now())

    def check(self, key: Key, use: KeyUse, cost: int, arrived: list[float] | None = None) -> None:
        """Refuses what cannot pass whatever its size, before anything is spent on it.  `cost` is
        that of the smallest request."""
        with self._without(use, arrived):
            self._check(key, use, tokens=1, cost=cost, explicit=True)

    def spare(self, key: Key, use: KeyUse) -> int | None:
        """What is left of the budget, once no other request holds any of it; else None.

        An answer without a limit of its own is cut where that is used up.
        """
        budget = key.policy.budget
        if budget is None:
            return None
        used = use.of(*self._period(key, use))
        return None if used.held else max(0, budget.units - used.spent)

    def take(
        self,
        key: Key,
        use: KeyUse,
        *,
        tokens: int,
        cost: int,
        explicit: bool,
        arrived: list[float] | None = None,
    ) -> Grant:
        """All of it or nothing.  `tokens` and `cost` (10^-9 of the currency) are what the request
        may use at most; `explicit` if the client set its limit.  What it took when it `arrived`
        counts from now on instead.

        Raises ExceedsKeyLimit, RateLimited, BudgetExceeded.
        """
        with self._without(use, arrived):
            self._check(key, use, tokens=tokens, cost=cost, explicit=explicit)
        now = self._now()
        if arrived is not None:
            use.requests.correct(arrived, 0, now)
        use.requests.enter(now, 1)
        period = self._period(key, use)[0]
        spending = use.counting(period)
        grant = Grant(period, spending, cost, use.tokens.enter(now, tokens))
        spending.held += cost
        use.waiting.append(grant)
        use.let_in()
        grant.ahead = len(use.waiting)
        return grant

    def end(self, key: Key, use: KeyUse, grant: Grant, *, tokens: int, cost: int) -> None:
        """What it really used; the next one that waits may run."""
        use.tokens.correct(grant.entry, tokens, self._now())
        grant.spending.held -= grant.cost
        grant.spending.spent += cost
        if grant.turn.is_set():
            use.running -= 1
        else:
            use.waiting.remove(grant)
        use.let_in()

    def headers(self, key: Key, use: KeyUse) -> dict[str, str]:
        """OpenAI's `x-ratelimit-*`, of the limits that the key has."""
        now, made = self._now(), {}
        windows = (
            ("requests", key.policy.rpm, use.requests),
            ("tokens", key.policy.tpm, use.tokens),
        )
        for name, limit, window in windows:
            if limit is not None:
                left = max(0, limit - window.used(now))
                made[f"x-ratelimit-limit-{name}"] = str(limit)
                made[f"x-ratelimit-remaining-{name}"] = str(left)
                made[f"x-ratelimit-reset-{name}"] = f"{window.empty_in(now):.3f}s"
        return made

    @contextmanager
    def _without(self, use: KeyUse, arrived: list[float] | None) -> Iterator[None]:
        """A request is not in its own way."""
        if arrived is None:
            yield
            return
        counted = int(arrived[1])
        use.requests.correct(arrived, 0, self._now())
        try:
            yield
        finally:
            use.requests.correct(arrived, counted, self._now())

    def _period(self, key: Key, use: KeyUse) -> tuple[int, int | None]:
        """The present period of its budget: when it began and ends, Unix milliseconds.  Without a
        budget the last one goes on."""
        budget = key.policy.budget
        if budget is None:
            return next(reversed(use.periods)), None
        return budget.window(key.created_at, round(self._wall() * 1000))

    def _check(self, key: Key, use: KeyUse, *, tokens: int, cost: int, explicit: bool) -> None:
        policy, now = key.policy, self._now()
        use.places = policy.max_parallel
        self._check_requests(key, use, now)
        if policy.tpm is not None:
            wait = use.tokens.wait(now, tokens, policy.tpm)
            if wait == math.inf:
                raise ExceedsKeyLimit(
                    f"The request may use {tokens} tokens, and the key {key.prefix}... allows "
                    f"{policy.tpm} per minute (tpm): lower max_tokens or shorten the prompt."
                )
            _refuse(wait, key, f"{policy.tpm} tokens per minute (tpm; this may use {tokens})")
        self._check_places(key, policy, use)
        self._check_budget(key, use, cost, explicit)

    def _check_requests(self, key: Key, use: KeyUse, now: float) -> None:
        rpm = key.policy.rpm
        if rpm is not None:
            _refuse(use.requests.wait(now, 1, rpm), key, f"{rpm} requests per minute (rpm)")

    def _check_places(self, key: Key, policy: Policy, use: KeyUse) -> None:
        most = policy.max_parallel
        if most is None or use.running < most or len(use.waiting) < policy.max_queue:
            return
        queue = f" and {policy.max_queue} that wait (max_queue)" if policy.max_queue else ""
        raise RateLimited(
            f"The key {key.prefix}... allows {most} requests at a time (max_parallel){queue}: "
            "try again when one has ended."
        )

    def _check_budget(self, key: Key, use: KeyUse, cost: int, explicit: bool) -> None:
        budget = key.policy.budget
        if budget is None:
            return
        begin, end = self._period(key, use)
        used = use.of(begin, end)
        left = budget.units - used.spent
        if cost > left and (explicit or not used.held):
            when = "raise the budget" if end is None else f"wait until {_utc(end)}"
            period = f" per {budget.period}" if budget.period else ""
            raise BudgetExceeded(
                f"The budget of the key {key.prefix}... is {budget.amount}{period}, of which "
                f"{amount.to_text(used.spent)} is spent, and this may cost {amount.to_text(cost)}: "
                f"{when if left <= 0 else f'lower max_tokens, or {when}'}."
            )
        if cost > left - used.held:
            raise RateLimited(
                f"Running requests of the key {key.prefix}... may use up its budget "
                f"({amount.to_text(left)} is left): try again when one has ended."
            )


def _refuse(wait: float, key: Key, limit: str) -> None:
    if wait > 0:
        seconds = max(1, math.ceil(wait))
        raise RateLimited(
            f"The key {key.prefix}... allows {limit}: try again in {seconds} s.",
            retry_after=seconds,
        )


def _utc(milliseconds: int) -> str:
    moment = datetime.fromtimestamp(math.ceil(milliseconds / 1000), UTC)
    return moment.isoformat().replace("+00:00", "Z")
