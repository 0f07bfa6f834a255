"""Money without floats: decimals in text, integers in 10^-9 of the currency inside."""

from __future__ import annotations

from decimal import Decimal, InvalidOperation, localcontext

UNITS = 10**9
# Prices are kept to 10^-6 per 1,000 tokens, so that one token's price is a whole number of
# 10^-9 units and sums are exact 64-bit integers, up to nine thousand million of the currency.
PRICE_MOST = 1_000_000
_PRICE_DECIMALS = 6


def cost(tokens: int, per_1k_tokens: str) -> int:
    """Price of `tokens` at a price per 1,000 (at most 6 decimals), in 10^-9 of the currency.

    Raises ValueError if that is no price.
    """
    with localcontext(prec=60):
        try:
            price = Decimal(per_1k_tokens)
        except InvalidOperation:
            raise ValueError(f"'{per_1k_tokens}', not a decimal number") from None
        in_range = price.is_finite() and 0 <= price <= PRICE_MOST
        if not in_range or round(price, _PRICE_DECIMALS) != price:
            raise ValueError(
                f"{per_1k_tokens}: it must be from 0 to {PRICE_MOST} with at most "
                f"{_PRICE_DECIMALS} decimals"
            )
        return int(price.scaleb(_PRICE_DECIMALS) * tokens)


def to_text(amount: int) -> str:
    """`1500000` -> `"0.0015"`: plain decimal, no exponent, no trailing zeros."""
    whole, part = divmod(amount, UNITS)
    return f"{whole}.{part:09d}".rstrip("0").rstrip(".")
