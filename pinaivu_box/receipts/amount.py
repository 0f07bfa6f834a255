"""Money without floats: decimals in text, integers in 10^-12 of the currency inside."""

from __future__ import annotations

from decimal import Decimal, localcontext

UNITS = 10**12


def cost(tokens: int, per_1k_tokens: str) -> int:
    """Price of `tokens` at a price per 1,000 (at most 9 decimals), in 10^-12 of the currency."""
    with localcontext(prec=60):
        return int(Decimal(per_1k_tokens).scaleb(9) * tokens)


def to_text(amount: int) -> str:
    """`1500000000` -> `"0.0015"`: plain decimal, no exponent, no trailing zeros."""
    whole, part = divmod(amount, UNITS)
    return f"{whole}.{part:012d}".rstrip("0").rstrip(".")
