"""What peers may charge this box: `[peering] max_price` and `max_debt`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping

from pinaivu_box import amount
from pinaivu_box.amount import Prices
from pinaivu_box.config import PeeringConfig

Debts = Mapping[str, Mapping[str, int]]  # what we owe, by peer and currency, in 10^-9


class SpendingLimits:
    """Counts what runs at peers as what it may cost there at most, so that requests that run side
    by side do not overstep a limit together."""

    def __init__(self, debts: Callable[[], Awaitable[Debts]], peering: PeeringConfig) -> None:
        self._debts = debts
        self._owed: Debts = {}
        self._running: dict[str, dict[str, int]] = {}
        self.configure(peering)

    def configure(self, peering: PeeringConfig) -> None:
        self._price = amount.per_token(peering.max_price) if peering.max_price else None
        self._debt = amount.parse(peering.max_debt) if peering.max_debt else None
        self._said = peering

    async def look(self) -> None:
        """At the ledger: before `why_not`."""
        if self._debt is not None:
            self._owed = await self._debts()

    def too_dear(self, prices: Prices) -> bool:
        if self._price is None:
            return False
        asked = (prices.prompt, prices.completion, prices.cached or "0")
        return any(amount.per_token(price) > self._price for price in asked)

    def why_not(self, peer: str, prices: Prices, currency: str, cost: int) -> str | None:
        """Why a request that may cost so much is not sent there."""
        if self.too_dear(prices):
            return (
                f"asks {prices.prompt} and {prices.completion} for 1,000 tokens, and this box pays "
                f"at most {self._said.max_price} (max_price)"
            )
        if self._debt is None or not cost:
            return None
        owed = self._owed.get(peer, {}).get(currency, 0) + sum(self._running_at(peer).values())
        if owed + cost <= self._debt:
            return None
        return (
            f"is owed {amount.to_text(owed)} {currency} by this box, which may owe at most "
            f"{self._said.max_debt} (max_debt) and would need {amount.to_text(cost)} more"
        )

    def began(self, peer: str, job: str, cost: int) -> None:
        self._running.setdefault(peer, {})[job] = cost

    def ended(self, peer: str, job: str) -> None:
        self._running_at(peer).pop(job, None)

    def _running_at(self, peer: str) -> dict[str, int]:
        return self._running.get(peer, {})
