"""Money without floats: decimals in text, integers in 10^-9 of the currency inside."""

from __future__ import annotations

import re
from decimal import Decimal, localcontext
from functools import lru_cache

from msgspec import Struct

UNITS = 10**9
# Prices are kept to 10^-6 per 1,000 tokens, so that one token's price is a whole number of
# 10^-9 units and sums are exact 64-bit integers, up to nine thousand million of the currency.
MOST = 1_000_000
_PRICE_DECIMALS = 6
_AMOUNT_DECIMALS = 9
# Decimal itself also takes digits of every script, spaces, underscores, infinity and NaN.
_PLAIN = re.compile(r"-?[0-9]{1,30}(?:\.[0-9]{1,30})?(?:[eE][+-]?[0-9]{1,3})?")


class Prices(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Prices of 1,000 tokens, decimal text.  `cached` is for prompt tokens that were found in the
    cache; without it they cost what other prompt tokens cost."""

    prompt: str
    completion: str
    cached: str | None = None

    def cost(self, prompt: int, cached: int, completion: int) -> int:
        """In 10^-9 of the currency; `cached` of the `prompt` tokens.  Raises ValueError if one of
        them is no price."""
        anew = per_token(self.prompt)
        found = anew if self.cached is None else per_token(self.cached)
        return (prompt - cached) * anew + cached * found + completion * per_token(self.completion)

    def most(self, prompt: int, completion: int) -> int:
        """What so many tokens can cost at most, however many of them are cached."""
        return max(self.cost(prompt, 0, completion), self.cost(prompt, prompt, completion))


def prices(given: str | Prices) -> Prices:
    """One price is that of prompt and completion tokens alike.  Raises ValueError."""
    made = Prices(given, given) if isinstance(given, str) else given
    made.cost(1, 0, 1)
    return made


def per_token(per_1k_tokens: str) -> int:
    """A price per 1,000 tokens (at most 6 decimals) as 10^-9 of the currency for one."""
    return _scaled(per_1k_tokens, _PRICE_DECIMALS)


def parse(text: str) -> int:
    """`"0.0015"` -> `1500000`.  Raises ValueError if it is no amount."""
    return _scaled(text, _AMOUNT_DECIMALS)


@lru_cache(1024)  # the same few prices, several times a request
def _scaled(text: str, decimals: int) -> int:
    with localcontext(prec=60):
        if not _PLAIN.fullmatch(text):
            raise ValueError(f"{text[:40]!r}, not a decimal number such as 0.15")
        number = Decimal(text)
        if not 0 <= number <= MOST or round(number, decimals) != number:
            raise ValueError(
                f"{text}: it must be from 0 to {MOST} with at most {decimals} decimals"
            )
        return int(number.scaleb(decimals))


def to_text(amount: int) -> str:
    """`1500000` -> `"0.0015"`: plain decimal, no exponent, no trailing zeros."""
    whole, part = divmod(amount, UNITS)
    return f"{whole}.{part:09d}".rstrip("0").rstrip(".")
