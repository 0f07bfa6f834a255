"""Accounts and keys as the admin API and the commands' --json show them.

Times are RFC 3339 in UTC, amounts decimal text.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import msgspec
from msgspec import UNSET, Struct, UnsetType

from pinaivu_box.amount import to_text
from pinaivu_box.config import Config
from pinaivu_box.policy import UNPRICED, Policy, free_of_charge
from pinaivu_box.store.accounts import Account, Role
from pinaivu_box.store.keys import Key
from pinaivu_box.store.times import now_ms, time_text


class Settings(Policy, frozen=True, omit_defaults=False):
    """A policy with all its settings, also those with default values."""


class AccountView(Struct, frozen=True):
    """`keys` counts those that are not revoked."""

    id: str
    name: str
    role: Role
    has_password: bool
    keys: int
    created_at: str
    request_id: str | UnsetType = UNSET


class KeyView(Struct, frozen=True):
    """The secret before the last rotation is valid until `old_until`.  `spent` is of the budget, in
    its present period."""

    id: str
    account: str
    name: str
    prefix: str
    last_four: str
    admin: bool
    state: str
    blocked: str | None
    policy: Settings
    created_at: str
    expires_at: str | None
    revoked_at: str | None
    old_until: str | None
    last_used_at: str | None
    requests: int
    tokens: int
    amount: str
    spent: str | None
    stopped: int | UnsetType = UNSET  # running requests, with now=true
    warning: str | UnsetType = UNSET  # of settings without effect
    request_id: str | UnsetType = UNSET


class NewKey(KeyView, frozen=True, kw_only=True):
    """`key` is the secret, which is shown only here."""

    key: str


def account_view(account: Account) -> AccountView:
    fields = msgspec.structs.asdict(account)
    return AccountView(**{**fields, "created_at": time_text(account.created_at)})


def key_view(key: Key) -> KeyView:
    return KeyView(**_fields(key))


def new_key_view(key: Key, secret: str) -> NewKey:
    return NewKey(**_fields(key), key=secret)


def warning(policy: Policy, config: Config) -> str | None:
    """What a key's owner should know of its settings: its budget limits nothing."""
    without_effect = policy.budget is not None and free_of_charge(policy, config)
    return UNPRICED if without_effect else None


def parse_time(text: str) -> int:
    """A date (and time) as Unix milliseconds; UTC unless it has an offset.  Raises ValueError."""
    try:
        moment = datetime.fromisoformat(text)
        moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
        return round(moment.timestamp() * 1000)
    except (ValueError, OverflowError):
        raise ValueError(
            f"'{text[:40]}' is not a time: write it as 2026-11-01 or 2026-11-01T12:00:00Z"
        ) from None


def _fields(key: Key) -> dict[str, Any]:
    now = now_ms()
    fields = {name: getattr(key, name) for name in KeyView.__struct_fields__ if hasattr(key, name)}
    for name in ("created_at", "expires_at", "revoked_at", "old_until", "last_used_at"):
        fields[name] = time_text(fields[name])
    budget, spent = key.policy.budget, None
    if budget is not None:
        spent = to_text(key.spent_in(*budget.window(key.created_at, now)))
    return {
        **fields,
        "state": key.state(now),
        "policy": Settings(**msgspec.structs.asdict(key.policy)),
        "amount": to_text(key.amount),
        "spent": spent,
    }
