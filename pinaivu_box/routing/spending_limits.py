"""What peers may charge this box: `[peering] max_price` and `max_debt`."""

from __future__ import annotations

from pinaivu_box import amount
from pinaivu_box.amount import Prices
from pinaivu_box.peering_config import PeeringConfig


def too_dear(prices: Prices, peering: PeeringConfig) -> bool:
    """Whether one of the prices is above `max_price`."""
    if not peering.max_price:
        return False
    asking_prices = (prices.prompt, prices.completion, prices.cached or "0")
    return max(map(amount.per_token, asking_prices)) > amount.per_token(peering.max_price)


def refusal(
    prices: Prices, peering: PeeringConfig, currency: str, *, owed: int, cost: int
) -> str | None:
    """Why a request that may cost so much is not sent to a peer with these prices, or None.

    `owed` is what this box owes it, with what runs there (in 10^-9 of the currency).
    """
    if too_dear(prices, peering):
        return (
            f"asks {prices.prompt} and {prices.completion} for 1,000 tokens, and this box pays at "
            f"most {peering.max_price} (max_price)"
        )
    if not peering.max_debt or not cost or owed + cost <= amount.parse(peering.max_debt):
        return None
    return (
        f"is owed {amount.to_text(owed)} {currency} by this box, which may owe at most "
        f"{peering.max_debt} (max_debt) and would need {amount.to_text(cost)} more"
    )
