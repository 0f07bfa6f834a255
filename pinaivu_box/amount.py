"""Money without floats: decimal text outside, integers in 10^-9 of the currency inside."""

from __future__ import annotations

import re
from collections.abc import Callable
from decimal import Decimal, localcontext
from functools import lru_cache
from typing import TypeVar

from msgspec import Struct

UNITS = 10**9
# Prices are kept to 10^-6 per 1,000 tokens, so that one token's price is a whole number of
# 10^-9 units and sums are exact 64-bit integers, up to nine thousand million of the currency.
MAX_AMOUNT = 1_000_000  # of the currency
_PRICE_DECIMALS = 6
_AMOUNT_DECIMALS = 9
# Decimal also accepts digits of every script, spaces, underscores, infinity and NaN.
_PLAIN = re.compile(r"-?[0-9]{1,30}(?:\.[0-9]{1,30})?(?:[eE][+-]?[0-9]{1,3})?")


class Prices(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Prices of 1,000 tokens, decimal text.  `cached` is for cached prompt tokens; without it they
    cost as much as other prompt tokens."""

    prompt: str
    completion: str
    cached: str | None = None

    def cost(self, prompt: int, cached: int, completion: int) -> int:
        """The cost in 10^-9 of the currency, if `cached` of the `prompt` tokens were cached.

        Raises ValueError if a price is not valid.
        """
        full = per_token(self.prompt)
        reduced = full if self.cached is None else per_token(self.cached)
        return (prompt - cached) * full + cached * reduced + completion * per_token(self.completion)

    def most(self, prompt: int, completion: int) -> int:
        """The maximum cost, however many of the prompt tokens are cached."""
        return max(self.cost(prompt, 0, completion), self.cost(prompt, prompt, completion))


_Price = TypeVar("_Price", bound=str | Prices)


def prices(price: str | Prices) -> Prices:
    """The prices of a setting: a single one is for prompt and completion.  Raises ValueError."""
    both = Prices(price, price) if isinstance(price, str) else price
    both.cost(1, 0, 1)
    return both


def per_parameters(per_billion: str | Prices, parameters: int) -> Prices:
    """Prices for a model with so many parameters, rounded to what a price can hold.

    Raises ValueError.
    """

    def scaled(price: str) -> str:
        each = Decimal(per_token(price)) * parameters / 10**9
        return to_text(min(round(each), MAX_AMOUNT * 10**6) * 1000)

    base = prices(per_billion)
    cached = None if base.cached is None else scaled(base.cached)
    return Prices(scaled(base.prompt), scaled(base.completion), cached)


def per_token(per_1k_tokens: str) -> int:
    """The price of a token in 10^-9 of the currency, from that of 1,000 (at most 6 decimals)."""
    return _scaled(per_1k_tokens, _PRICE_DECIMALS)


def parse(text: str) -> int:
    """The units of 10^-9 of a decimal: `"0.0015"` -> `1500000`.  Raises ValueError."""
    return _scaled(text, _AMOUNT_DECIMALS)


@lru_cache(1024)  # few prices, used several times in each request
def _scaled(text: str, decimals: int) -> int:
    with localcontext(prec=60):
        if not _PLAIN.fullmatch(text):
            raise ValueError(f"{text[:40]!r}, not a decimal number such as 0.15")
        number = Decimal(text)
        if not 0 <= number <= MAX_AMOUNT or round(number, decimals) != number:
            raise ValueError(
                f"{text}: it must be from 0 to {MAX_AMOUNT} with at most {decimals} decimals"
            )
        return int(number.scaleb(decimals))


def to_text(amount: int) -> str:
    """The decimal of an amount, without exponent or trailing zeros: `1500000` -> `"0.0015"`."""
    whole, part = divmod(amount, UNITS)
    return f"{whole}.{part:09d}".rstrip("0").rstrip(".")


def check(name: str, value: _Price, read: Callable[[_Price], object]) -> None:
    """Check that `read` can read the value.  Raises ValueError that begins with the name."""
    try:
        read(value)
    except ValueError as error:
        raise ValueError(f"{name} is {error}") from error
