"""The sections `[[upstream]]` of the configuration: other servers with OpenAI's API."""

from __future__ import annotations

import re
from typing import Annotated, Literal
from urllib.parse import urlsplit

from msgspec import Meta, field

from pinaivu_box import amount
from pinaivu_box.amount import Prices
from pinaivu_box.config_section import BASE_URL, PositiveInt, Section

_NAME = re.compile("[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class UpstreamConfig(Section, frozen=True, kw_only=True):
    """Another server with OpenAI's API; `url` is that of its `/models` without it.

    `models` are its names, with `*` for any characters, or names here with the names there.  The
    key is in an environment variable or a file, never here.  `price` is that of all its models,
    `prices` of single ones by their names here.
    """

    name: str
    url: str
    models: tuple[str, ...] | dict[str, str] = ("*",)
    key_env: str = ""
    key_file: str = ""
    concurrency: PositiveInt = 32
    price: str | Prices = ""
    prices: dict[str, str | Prices] = field(default_factory=dict)
    health: Literal["models", "health", "none"] = "models"
    health_seconds: Annotated[float, Meta(ge=0.1)] = 15.0
    connect_seconds: Annotated[float, Meta(gt=0)] = 5.0
    first_token_seconds: Annotated[float, Meta(gt=0)] = 300.0
    stall_seconds: Annotated[float, Meta(gt=0)] = 60.0
    openai_only: bool = False
    for_peers: bool = False


def check(upstream: UpstreamConfig) -> None:
    if not _NAME.fullmatch(upstream.name):
        raise ValueError(
            f"the upstream name '{upstream.name[:80]}' is not made of letters, digits, '.', '_' "
            "and '-'"
        )
    where = f"upstream {upstream.name}"
    try:
        parts = urlsplit(upstream.url)
        is_base = bool(parts.hostname) and parts.port != 0 and not (parts.query or parts.fragment)
    except ValueError:
        is_base = False
    if not is_base or not BASE_URL.fullmatch(upstream.url):
        raise ValueError(
            f"{where}: its url is no base URL such as https://HOST/v1 or http://HOST:8000/v1"
        )
    if "@" in parts.netloc:
        raise ValueError(f"{where}: its url holds a password: use key_env or key_file")
    if upstream.key_env and upstream.key_file:
        raise ValueError(f"{where}: it has both key_env and key_file: leave one out")
    if not upstream.models or not all(upstream.models):
        raise ValueError(f'{where}: it has no models: write ["*"] for all that it has')
    amount.check(f"{where}: its price", upstream.price or "0", amount.prices)
    for model, price in upstream.prices.items():
        amount.check(f'{where}: its price of "{model}"', price, amount.prices)
