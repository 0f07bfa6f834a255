"""What peers may charge this box: `[peering] max_price` and `max_debt`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping

from pinaivu_box import amount
from pinaivu_box.amount import Prices
from pinaivu_box.settings import LiveSettings

Debts = Mapping[str, Mapping[str, int]]  # what this box owes, by peer and currency, in 10^-9


class SpendingLimits:
    """`debts` reads the ledger."""

    def __init__(self, debts: Callable[[], Awaitable[Debts]], settings: LiveSettings) -> None:
        self._debts, self._settings = debts, settings
        self._owed: Debts = {}

    async def read_debts(self) -> None:
        """Look at the ledger, before `refusal`."""
        if self._settings.config.peering.max_debt:
            self._owed = await self._debts()

    def too_dear(self, prices: Prices) -> bool:
        limit = self._settings.config.peering.max_price
        if not limit:
            return False
        asking_prices = (prices.prompt, prices.completion, prices.cached or "0")
        return any(amount.per_token(price) > amount.per_token(limit) for price in asking_prices)

    def refusal(
        self, peer: str, prices: Prices, currency: str, cost: int, *, running: int
    ) -> str | None:
        """Why a request that may cost so much is not sent there, or None.  What runs there counts
        as what it may cost at most, so requests side by side do not exceed a limit together."""
        peering = self._settings.config.peering
        if self.too_dear(prices):
            return (
                f"asks {prices.prompt} and {prices.completion} for 1,000 tokens, and this box pays "
                f"at most {peering.max_price} (max_price)"
            )
        if not peering.max_debt or not cost:
            return None
        owed = self._owed.get(peer, {}).get(currency, 0) + running
        if owed + cost <= amount.parse(peering.max_debt):
            return None
        return (
            f"is owed {amount.to_text(owed)} {currency} by this box, which may owe at most "
            f"{peering.max_debt} (max_debt) and would need {amount.to_text(cost)} more"
        )
