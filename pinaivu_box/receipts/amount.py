"""Money without floats: decimals in text, integers in 10^-9 of the currency inside."""

from __future__ import annotations

from decimal import Decimal, localcontext

UNITS = 10**9


def cost(tokens: int, per_1k_tokens: str) -> int:
    """Price of `tokens` at a price per 1,000 (at most 6 decimals), in 10^-9 of the currency."""
    with localcontext(prec=60):
        return int(Decimal(per_1k_tokens).scaleb(6) * tokens)


def to_text(amount: int) -> str:
    """`1500000` -> `"0.0015"`: plain decimal, no exponent, no trailing zeros."""
    whole, part = divmod(amount, UNITS)
    return f"{whole}.{part:09d}".rstrip("0").rstrip(".")
