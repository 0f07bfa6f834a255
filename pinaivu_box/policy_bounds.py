"""What an account's own keys may have: no more than the key that makes them."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from msgspec import structs

from pinaivu_box.config import parse_duration
from pinaivu_box.policy import LOCAL_ONLY, Budget, Policy

_LIMITS = {
    "rpm": "requests per minute",
    "tpm": "tokens per minute",
    "max_parallel": "requests at the same time",
}
_LISTS = ("models", "networks", "peers")  # empty allows all
_WILDCARDS = frozenset("*?[")


def within(policy: Policy, allowed: Policy) -> Policy:
    """The policy with the limits of `allowed` where it names none of its own."""
    inherited: dict[str, Any] = {
        name: getattr(allowed, name)
        for name in (*_LIMITS, *_LISTS, "budget", "routing")
        if not getattr(policy, name)
    }
    if allowed.max_parallel is not None and policy.max_parallel is None:
        inherited["max_queue"] = allowed.max_queue
    if policy.scopes == Policy().scopes:  # those of a key that names none
        shared = tuple(scope for scope in policy.scopes if scope in allowed.scopes)
        inherited["scopes"] = shared or policy.scopes
    if allowed.local_only and not policy.local_only:
        inherited["scopes"] = (*inherited.get("scopes", policy.scopes), LOCAL_ONLY)
    if not policy.prices:
        inherited["prices"] = allowed.prices
    if allowed.audit == "off":
        inherited["audit"] = "off"
    if policy.weight == 1.0:
        inherited["weight"] = min(1.0, allowed.weight)
    return structs.replace(policy, **inherited)


def excess(policy: Policy, allowed: Policy, before: Policy | None = None) -> tuple[str, str] | None:
    """The first setting of a policy that exceeds the allowed one, and why, as the end of a
    sentence; None if none does.  What is as it was `before` may stay."""
    for name in Policy.__struct_fields__:
        if before is not None and getattr(policy, name) == getattr(before, name):
            continue
        if why := _excess_of(name, policy, allowed):
            return name, why
    return None


def _excess_of(name: str, policy: Policy, allowed: Policy) -> str:
    mine, most = getattr(policy, name), getattr(allowed, name)
    match name:
        case "scopes":
            more = [scope for scope in mine if scope not in (*most, LOCAL_ONLY)]
            if more:
                return f"it has no scope '{more[0]}' to give"
            if allowed.local_only and not policy.local_only:
                return "its requests stay on this box, so the key needs the scope 'local-only'"
        case "routing":
            if allowed.local_only and not policy.local_only:
                return "its requests stay on this box"
            if most is not None and mine != most and mine != "never":
                return f"its routing is '{most}'"
        case "models":
            if glob := _not_covered(mine, most):
                return f"it may use {', '.join(most)} only, not {glob}"
        case "peers":
            more = [peer for peer in mine or ("all",) if most and peer not in most]
            if more:
                return f"its requests may go to {', '.join(most)} only, not to {more[0]}"
        case "networks":
            more = [one for one in mine or ("0.0.0.0/0", "::/0") if most and not _in(one, most)]
            if more:
                return f"it works in {', '.join(most)} only, not in {more[0]}"
        case "rpm" | "tpm" | "max_parallel":
            if most is not None and (mine is None or mine > most):
                return f"it has at most {most} {_LIMITS[name]}"
        case "max_queue":
            if allowed.max_parallel is not None and mine > most:
                return f"at most {most} of its requests may wait"
        case "budget":
            if most is not None and not _within_budget(mine, most):
                period = f" per {most.period}" if most.period else ""
                return f"its budget is {most.amount}{period}"
        case "weight":
            if mine > most:
                return f"its weight is {most:g}"
        case "prices":
            if mine != most:
                return "prices are set by an admin"
    return ""


def _not_covered(mine: Sequence[str], most: Sequence[str]) -> str:
    if not most:
        return ""
    return next((one for one in mine or ("*",) if not any(_covers(g, one) for g in most)), "")


def _covers(allowed: str, glob: str) -> bool:
    """Whether all that fits `glob` fits `allowed`; False where that is not certain."""
    if allowed in (glob, "*"):
        return True
    if not _WILDCARDS & set(glob):
        return fnmatchcase(glob, allowed)
    prefix = allowed.removesuffix("*")
    return allowed.endswith("*") and not _WILDCARDS & set(prefix) and glob.startswith(prefix)


def _in(network: str, networks: Sequence[str]) -> bool:
    try:
        inner = ipaddress.ip_network(network)
    except ValueError:
        return False
    for one in networks:
        outer = ipaddress.ip_network(one)
        if inner.version == outer.version and inner.subnet_of(outer):  # type: ignore[arg-type]
            return True
    return False


def _within_budget(mine: Budget | None, most: Budget) -> bool:
    """A period that is longer allows less; without one, the amount is all."""
    if mine is None or mine.units > most.units:
        return False
    if mine.period is None or most.period is None:
        return mine.period is None
    return parse_duration(mine.period) >= parse_duration(most.period)
