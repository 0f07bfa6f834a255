"""The policies of keys and peers: what they may do, their limits, and the prices of keys."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from datetime import datetime
from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from pinaivu_box import amount
from pinaivu_box.amount import Prices
from pinaivu_box.config import (
    Config,
    parse_duration,
    parse_span,
)
from pinaivu_box.peering_config import PeeringServeConfig, RoutingPolicy

Scope = Literal["inference", "usage", "receipts", "account", "admin", "local-only"]
SCOPES: tuple[Scope, ...] = ("inference", "usage", "receipts", "account", "admin")
LOCAL_ONLY: Scope = "local-only"  # grants nothing: it restricts the others
MEMBER_SCOPES: tuple[Scope, ...] = SCOPES[:3]
ADMIN_SCOPES: tuple[Scope, ...] = (*MEMBER_SCOPES, "admin")

RATES = ("rpm", "tpm", "max_parallel")  # limits of what is used in a minute, or at a time
_Limit = Annotated[int, Meta(ge=1, le=2**53)]
_MAX_PERIOD_SECONDS = 3660 * 86400.0
UNPRICED = (
    "The budget has no effect, because no model that the key may use has a price: set prices under "
    "[pricing], or for the key (--price)."
)
_ANY = "\0"  # stands for the models without a price of their own: only globs for all fit it
LONGEST_LIFE = 36500 * 86400.0  # of a key, seconds


class Budget(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """At most `amount` (decimal text, in the currency of the box) in each `period` ("30d") since
    the creation of the key; without a period, in total."""

    amount: str
    period: str | None = None

    @property
    def units(self) -> int:
        """In 10^-9 of the currency."""
        return amount.parse(self.amount)

    def window(self, created_at: int, now: int) -> tuple[int, int | None]:
        """The beginning and the end of the period that contains `now`, in Unix milliseconds."""
        if self.period is None:
            return created_at, None
        length = round(parse_duration(self.period) * 1000)
        begin = created_at + (now - created_at) // length * length
        return begin, begin + length


class Policy(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The settings of a key.

    `models`: globs of model ids, empty for all.  `networks`: CIDR, empty for all.  `rpm` and `tpm`:
    maximum requests and tokens in any 60 seconds.  `max_parallel` requests run at the same time; up
    to `max_queue` more wait, further ones get a 429.  `weight` is the share of a busy engine
    relative to other keys.  With the scope `local-only` its requests stay on this box, and share
    cached prefixes with no other key; otherwise they may go to `peers` (names or node ids; empty
    for all), and `routing` overrides `[peering] policy`; "never" is the same as `local-only`.  With
    `strict`, fields of a request that are not supported are refused instead of ignored and named in
    the answer; `lenient`, of earlier versions, has no effect.  `prices`: the price of 1,000 tokens,
    or several, by glob of model ids; the first match applies.  With `audit` "off" nothing that
    peers serve for it is computed again.
    """

    scopes: tuple[Scope, ...] = MEMBER_SCOPES
    models: tuple[str, ...] = ()
    networks: tuple[str, ...] = ()
    rpm: _Limit | None = None
    tpm: _Limit | None = None
    max_parallel: _Limit | None = None
    max_queue: Annotated[int, Meta(ge=0, le=2**31)] = 0
    budget: Budget | None = None
    weight: Annotated[float, Meta(ge=0.01, le=100)] = 1.0
    lenient: bool = False
    strict: bool = False
    peers: tuple[str, ...] = ()
    routing: RoutingPolicy | None = None
    prices: dict[str, str | Prices] = {}
    audit: Literal["on", "off"] = "on"

    @property
    def local_only(self) -> bool:
        return LOCAL_ONLY in self.scopes or self.routing == "never"

    def serves(self, model_id: str) -> bool:
        return not self.models or any(fnmatchcase(model_id, glob) for glob in self.models)

    def admits(self, address: str) -> bool:
        """Whether requests from an IP address are allowed."""
        return not self.networks or in_networks(address, self.networks)

    def prices_of(self, model_id: str) -> Prices | None:
        """The key's own prices of a model, None if it has none."""
        for glob, prices in self.prices.items():
            if fnmatchcase(model_id, glob):
                return amount.prices(prices)
        return None


def in_networks(address: str, networks: Sequence[str]) -> bool:
    """Whether an IP address is in one of the networks, which are CIDR."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped:
        ip = ip.ipv4_mapped
    return any(ip in ipaddress.ip_network(network) for network in networks)


class PeerPolicy(PeeringServeConfig, frozen=True):
    """What a peer may have: `[peering.serve]`, or what is set for that peer alone.

    `blocked` says why it gets nothing.
    """

    blocked: str | None = None

    @property
    def limited(self) -> bool:
        """Whether it matters how much a request may use: only then its prompt is counted first."""
        return bool(self.credit_limit or self.tokens_per_minute)

    @property
    def open(self) -> bool:
        """Whether it is between the two times of day (local time); always, if there are none."""
        if not self.hours:
            return True
        begin, end = self.hours.split("-")
        now = datetime.now().strftime("%H:%M")
        return begin <= now < end if begin <= end else now >= begin or now < end

    @property
    def refusal(self) -> str | None:
        """Why the peer gets nothing at all now, in a sentence for it, or None."""
        if self.blocked is not None:
            return f"This box serves nothing to your box: {self.blocked}."
        return None if self.open else f"This box serves its peers from {self.hours} only."

    def serves(self, model_id: str) -> bool:
        return any(fnmatchcase(model_id, glob) for glob in self.models)


def changed(policy: Policy, changes: dict[str, Any]) -> Policy:
    """The policy with these settings, as in JSON: null resets one to its default.

    Raises msgspec.ValidationError; `check` it then.
    """
    merged = {**msgspec.to_builtins(policy), **changes}
    result = msgspec.convert({name: v for name, v in merged.items() if v is not None}, Policy)
    if result.scopes == (LOCAL_ONLY,):  # which grants nothing by itself
        return msgspec.structs.replace(result, scopes=(*MEMBER_SCOPES, LOCAL_ONLY))
    return result


def check(policy: Policy) -> None:
    """Check what the types do not.  Raises ValueError with a clause."""
    for network in policy.networks:
        try:
            ipaddress.ip_network(network)
        except ValueError as error:
            raise ValueError(f"networks: {error}; write 192.168.1.0/24, for example") from None
    if "" in policy.models:
        raise ValueError("models: an empty name matches nothing; write a model id or a glob")
    if policy.max_queue and policy.max_parallel is None:
        raise ValueError("max_queue needs max_parallel: without it, requests never wait")
    if policy.budget is not None:
        _check_budget(policy.budget)
    for glob, prices in policy.prices.items():
        amount.check(f'prices."{glob}"', prices, amount.prices)


def _check_budget(budget: Budget) -> None:
    amount.check("budget: its amount", budget.amount, amount.parse)
    try:
        period = 1.0 if budget.period is None else parse_duration(budget.period)
    except ValueError as error:
        raise ValueError(f"budget: {error}") from None
    if not 1 <= period <= _MAX_PERIOD_SECONDS:
        raise ValueError("budget: a period must be from 1s to 3660d (10 years)")


def parse_budget(text: str) -> Budget:
    """`"10 per 30d"` or `"10"`.  Raises ValueError."""
    spent, _, period = text.partition(" per ")
    budget = Budget(spent.strip(), period.strip() or None)
    check_new(budget)
    return budget


def check_new(budget: Budget) -> None:
    """Check a new budget: its period needs a unit; old ones may have none.  Raises ValueError."""
    _check_budget(budget)
    if budget.period is not None:
        parse_span(budget.period)


def free_of_charge(policy: Policy, config: Config) -> bool:
    """Whether no model that the key may use has a price, so that a budget has no effect."""

    def costs(price: str | Prices) -> bool:
        return amount.prices(price or "0").most(1, 1) > 0

    if any(map(costs, policy.prices.values())):
        return False
    own = _own_prices(config)
    prices = {name: [price] for name, price in own.items() if policy.serves(name)}
    if not policy.models or any(glob not in own for glob in policy.models):
        pricing, upstreams = config.pricing, [upstream.price for upstream in config.upstream]
        prices[_ANY] = [pricing.per_1k_tokens, pricing.per_billion, *upstreams]
    return not any(
        policy.prices_of(name) is None and any(map(costs, several))
        for name, several in prices.items()
    )


def _own_prices(config: Config) -> dict[str, str | Prices]:
    """Those that are set for single models, by their names."""
    prices = dict(config.pricing.models)
    for upstream in config.upstream:
        prices |= upstream.prices
    return prices | {model.name: model.price for model in config.model if model.price}
