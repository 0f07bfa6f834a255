"""`/v1/account/keys`: the keys that an account has and makes itself.

They may do no more than the account's pages key, which an admin limits, and than the key that asks,
if it is not the session's.  Limits are shared out, not multiplied: those of the keys that an
account makes are no larger together than those of the pages key.
"""

from __future__ import annotations

import asyncio
from datetime import datetime
from typing import Any

from msgspec import UNSET, Struct, UnsetType, structs
from starlette.requests import Request

from pinaivu_box import amount
from pinaivu_box.admin import lists
from pinaivu_box.admin.lists import KeyList
from pinaivu_box.admin.views import KeyView, NewKey, key_view, new_key_view
from pinaivu_box.errors import Conflict, Forbidden, InvalidBody, NotFound, RateLimited
from pinaivu_box.policy import RATES, Budget, Policy
from pinaivu_box.policy_bounds import excess, within
from pinaivu_box.server.admin_keys import (
    DEFAULT_ROTATION,
    Moment,
    Name,
    RotateKey,
    StopRunning,
    changed_policy,
    expiry,
    stop_requests,
    with_warning,
)
from pinaivu_box.server.auth import account_of, key_of
from pinaivu_box.server.context import actor_of, box_of, named_field
from pinaivu_box.server.paging import PageQuery
from pinaivu_box.server.sessions import session_of
from pinaivu_box.store import keys, new_keys, own_keys, pages_keys
from pinaivu_box.store.accounts import Account
from pinaivu_box.store.keys import Key
from pinaivu_box.store.new_keys import Draft
from pinaivu_box.store.times import now_ms, time_text

_MAX_KEYS = 50  # of an account that are not revoked, to make more by itself
_MAX_A_DAY = 200  # that an account gets, to make more by itself
_DAY = 86_400_000  # milliseconds


class CreateOwnKey(Struct, frozen=True):
    """Limits that are left out are those of the account's pages key, of budget, `rpm`, `tpm` and
    `max_parallel` what its other keys leave; the scopes too, but for `account` and `admin`, which
    are to be named."""

    name: Name = ""
    policy: Policy = Policy()
    expires_at: Moment | None = None


class ChangeOwnKey(Struct, frozen=True):
    """Only the fields that are present are changed, also in `policy`, where null restores what a
    new key would have."""

    name: Name | UnsetType = UNSET
    policy: dict[str, Any] | UnsetType = UNSET
    expires_at: Moment | UnsetType | None = UNSET


async def list_keys(request: Request, query: PageQuery) -> KeyList:
    account = await account_of(request)
    return await lists.list_keys(
        box_of(request).database, account=account.id, after=query.after, limit=query.limit
    )


async def create_key(request: Request, body: CreateOwnKey) -> NewKey:
    """Raises InvalidBody for more than is allowed, Conflict for too many keys, RateLimited,
    Forbidden."""
    _check_unlimited(request)
    database = box_of(request).database
    async with _lock(request, (await account_of(request)).id):
        account = await account_of(request)
        await _check_number(request, account)
        policy, expires_at = body.policy, expiry(body.expires_at) if body.expires_at else None
        pages_key, *asking = await _limiting(request, account)
        left = await _left(request, pages_key)
        policy = within(policy, left)
        for limiting in (pages_key, *asking):
            policy = within(policy, limiting.policy)
            if expires_at is None:
                expires_at = limiting.expires_at
            _check(policy, expires_at, limiting)
        _check_shares(policy, left, pages_key)
        draft = Draft(body.name, account.id, policy, expires_at)
        key, secret = await new_keys.create(database, draft, actor_of(request))
    return with_warning(request, new_key_view(key, secret))


async def change_key(request: Request, key_id: str, body: ChangeOwnKey) -> KeyView:
    """Raises NotFound, InvalidBody for more than is allowed, Conflict for the pages key,
    Forbidden."""
    _check_unlimited(request)
    async with _lock(request, (await account_of(request)).id):
        return await _change_key(request, key_id, body)


async def _change_key(request: Request, key_id: str, body: ChangeOwnKey) -> KeyView:
    account, key = await _own(request, key_id)
    limits = await _limiting(request, account)
    left = await _left(request, limits[0], beside=key)
    policy: Policy | UnsetType = UNSET
    if body.policy is not UNSET:
        reset = [name for name, value in body.policy.items() if value is None]
        changed = changed_policy(key.policy, body.policy)
        policy = _as_of_a_new_key(changed, reset, [left, *(each.policy for each in limits)])
    moment = body.expires_at
    expires_at = expiry(moment) if isinstance(moment, datetime) else moment
    for limiting in limits:
        _check(
            key.policy if policy is UNSET else policy,
            key.expires_at if expires_at is UNSET else expires_at,
            limiting,
            before=key,
        )
    if policy is not UNSET:
        _check_shares(policy, left, limits[0], before=key.policy)
    edited = await keys.edit(
        box_of(request).database,
        key,
        actor_of(request),
        name=body.name,
        policy=policy,
        expires_at=expires_at,
    )
    return with_warning(request, key_view(edited))


def _as_of_a_new_key(policy: Policy, names: list[str], allowed: list[Policy]) -> Policy:
    """The policy with what a new key would have of these settings."""
    made = policy
    for each in allowed:
        made = within(made, each)
    return structs.replace(policy, **{name: getattr(made, name) for name in names})


async def rotate_key(request: Request, key_id: str, body: RotateKey = DEFAULT_ROTATION) -> NewKey:
    """Raises NotFound, Conflict, Forbidden; InvalidBody if the new secret could do more than who
    asks."""
    with named_field("body", "overlap"):
        overlap = keys.parse_overlap(body.overlap)
    _check_unlimited(request)
    account, key = await _own(request, key_id)
    for limiting in await _limiting(request, account):
        _check(key.policy, key.expires_at, limiting)
    database = box_of(request).database
    return new_key_view(*await keys.rotate(database, key, overlap, actor_of(request)))


async def revoke_key(request: Request, key_id: str, query: StopRunning) -> KeyView:
    """Raises NotFound, Conflict for the pages key."""
    _, key = await _own(request, key_id)
    key = await keys.revoke(box_of(request).database, key, actor_of(request))
    return stop_requests(request, key) if query.now else key_view(key)


async def _own(request: Request, key_id: str) -> tuple[Account, Key]:
    account = await account_of(request)
    key = await keys.get(box_of(request).database, key_id)
    if key.account_id != account.id:
        raise NotFound("There is no key with this id in your account: list your keys.")
    if not key.prefix:
        raise Conflict("This is what the pages of your account use: an admin changes it.")
    return account, key


async def _limiting(request: Request, account: Account) -> list[Key]:
    """The keys that say what another key of the account may have."""
    pages_key = await pages_keys.of(box_of(request).database, account, actor_of(request))
    asking = key_of(request)
    return [pages_key] if asking.id == pages_key.id else [pages_key, asking]


def _check(
    policy: Policy, expires_at: int | None, limiting: Key, before: Key | None = None
) -> None:
    """Raises InvalidBody."""
    who = "your key for pages" if not limiting.prefix else f"the key {limiting.label}"
    if found := excess(policy, limiting.policy, None if before is None else before.policy):
        name, why = found
        raise InvalidBody(
            f"this is more than {who} has: {why}; ask an admin for more",
            loc=("body", "policy", name),
        )
    unchanged = before is not None and expires_at == before.expires_at
    if limiting.expires_at is None or unchanged:
        return
    if expires_at is None or expires_at > limiting.expires_at:
        raise InvalidBody(
            f"{who} expires at {time_text(limiting.expires_at)}, and no other may later",
            loc=("body", "expires_at"),
        )


def _check_unlimited(request: Request) -> None:
    """Raises Forbidden for an API key with a limit, which other keys would multiply."""
    if session_of(request) is not None:
        return
    policy = key_of(request).policy
    if policy.budget or any(getattr(policy, name) for name in RATES):
        raise Forbidden(
            "A key with a budget or a limit of its rate makes, changes and rotates no keys: do it "
            "on the page /keys, or with a key without limits."
        )


async def _check_number(request: Request, account: Account) -> None:
    """Raises Conflict, RateLimited."""
    if account.keys > _MAX_KEYS:
        raise Conflict(f"Your account has {_MAX_KEYS} keys already: revoke some of them.")
    made = await own_keys.made_since(box_of(request).database, account.id, now_ms() - _DAY)
    if made >= _MAX_A_DAY:
        raise RateLimited(
            f"Your account has made {_MAX_A_DAY} keys in a day, which is the limit: use those that "
            "it has, or try again tomorrow.",
            retry_after=3600,
        )


def _lock(request: Request, account_id: str) -> asyncio.Lock:
    """Held from the check to the write: two requests at once do not share out the same."""
    return box_of(request).own_key_locks.setdefault(account_id, asyncio.Lock())


async def _left(request: Request, pages_key: Key, beside: Key | None = None) -> Policy:
    """The pages key's policy, with what the other keys of the account leave of its limits: 0, or a
    budget of "0", if that is nothing."""
    database, now, policy = box_of(request).database, now_ms(), pages_key.policy
    without = "" if beside is None else beside.id
    left: dict[str, Any] = {}
    if any(getattr(policy, name) for name in RATES):
        used = await own_keys.rates(database, pages_key.account_id, beside=without, now=now)
        for name in RATES:
            if most := getattr(policy, name):
                left[name] = max(0, most - used[name])
    if (budget := policy.budget) is not None:
        shared = await own_keys.budgets(database, pages_key, beside=without, now=now)
        left["budget"] = Budget(amount.to_text(max(0, budget.units - shared)), budget.period)
    return structs.replace(policy, **left)


def _check_shares(
    policy: Policy, left: Policy, pages_key: Key, before: Policy | None = None
) -> None:
    """Raises InvalidBody if the account's keys would have more together than its pages key."""
    for name in RATES:
        mine, most = getattr(policy, name), getattr(left, name)
        unchanged = before is not None and mine == getattr(before, name)
        if most is not None and not unchanged and (mine or 0) > most:
            raise InvalidBody(
                f"your keys may have {getattr(pages_key.policy, name)} together, of which {most} "
                "are left (keys that were lowered or revoked count for another minute): give this "
                "one fewer",
                loc=("body", "policy", name),
            )
    if (budget := policy.budget) is None or left.budget is None:
        return
    unchanged = before is not None and budget == before.budget
    if not unchanged and not 0 < budget.units <= left.budget.units:
        assert pages_key.policy.budget is not None
        raise InvalidBody(
            f"the budgets of your keys, with what your pages have spent, may be "
            f"{pages_key.policy.budget.amount} together, of which {left.budget.amount} is left: "
            "give this one a smaller part",
            loc=("body", "policy", "budget"),
        )
