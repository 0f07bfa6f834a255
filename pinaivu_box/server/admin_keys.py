"""`/v1/admin/keys`.

A key is named by its id alone, because names and secrets do not belong in an address.
"""

from __future__ import annotations

import time
from datetime import datetime
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType
from starlette.requests import Request

from pinaivu_box import policy as policies
from pinaivu_box.admin import lists
from pinaivu_box.admin.lists import KeyList
from pinaivu_box.admin.views import KeyView, NewKey, key_view, new_key_view, warning
from pinaivu_box.errors import InvalidBody
from pinaivu_box.gateway.admission import refusal
from pinaivu_box.openai.decoding import from_validation
from pinaivu_box.policy import LONGEST_LIFE, Policy
from pinaivu_box.server.context import actor_of, box_of, named_field
from pinaivu_box.server.paging import PageQuery
from pinaivu_box.store import keys, new_keys
from pinaivu_box.store.keys import OVERLAP, Key
from pinaivu_box.store.new_keys import Draft

View = TypeVar("View", bound=KeyView)
Moment = Annotated[datetime, Meta(tz=True)]
Name = Annotated[str, Meta(max_length=200)]


class CreateKey(Struct, frozen=True):
    """Without an `account` a key gets an account of its own, or the owner's if it has the scope
    `admin`."""

    name: Name = ""
    account: str | None = None
    policy: Policy = Policy()
    expires_at: Moment | None = None


class ChangeKey(Struct, frozen=True):
    """Only the fields that are present are changed, also in `policy` (fields of Policy), where null
    restores a default.  `blocked` is the reason for blocking the key; null unblocks it."""

    name: Name | UnsetType = UNSET
    policy: dict[str, Any] | UnsetType = UNSET
    expires_at: Moment | UnsetType | None = UNSET
    blocked: Annotated[str, Meta(min_length=1, max_length=200)] | UnsetType | None = UNSET


class RotateKey(Struct, frozen=True):
    """The current secret keeps working for `overlap` ("24h"); "0" revokes it now."""

    overlap: str = OVERLAP


DEFAULT_ROTATION = RotateKey()


class KeyQuery(PageQuery, frozen=True):
    """`q`: the beginning of names or secrets.  `usable`: only keys that are not revoked.  Empty
    parameters count as absent."""

    account: str | None = None
    q: Annotated[str, Meta(max_length=200)] = ""
    usable: bool = False


class StopRunning(Struct, frozen=True, forbid_unknown_fields=True):
    """`now`: also stop the running requests of the key."""

    now: bool = False


async def list_keys(request: Request, query: KeyQuery) -> KeyList:
    return await lists.list_keys(
        box_of(request).database,
        account=query.account or None,
        beginning=query.q,
        usable=query.usable,
        after=query.after or None,
        limit=query.limit,
    )


async def create_key(request: Request, body: CreateKey) -> NewKey:
    expires_at = None if body.expires_at is None else expiry(body.expires_at)
    draft = Draft(body.name, body.account, body.policy, expires_at)
    key, secret = await new_keys.create(box_of(request).database, draft, actor_of(request))
    return with_warning(request, new_key_view(key, secret))


async def get_key(request: Request, key_id: str) -> KeyView:
    return key_view(await keys.get(box_of(request).database, key_id))


async def change_key(request: Request, key_id: str, body: ChangeKey, query: StopRunning) -> KeyView:
    if query.now and not body.blocked:
        raise InvalidBody("now needs a reason in blocked", loc=("query", "now"))
    database = box_of(request).database
    key = await keys.get(database, key_id)
    key = await keys.edit(
        database,
        key,
        actor_of(request),
        name=body.name,
        policy=UNSET if body.policy is UNSET else changed_policy(key.policy, body.policy),
        expires_at=expiry(moment) if isinstance(moment := body.expires_at, datetime) else moment,
        blocked=body.blocked,
    )
    view = stop_requests(request, key) if query.now else key_view(key)
    return with_warning(request, view)


async def rotate_key(request: Request, key_id: str, body: RotateKey = DEFAULT_ROTATION) -> NewKey:
    with named_field("body", "overlap"):
        overlap = keys.parse_overlap(body.overlap)
    database = box_of(request).database
    key = await keys.get(database, key_id)
    return new_key_view(*await keys.rotate(database, key, overlap, actor_of(request)))


async def revoke_key(request: Request, key_id: str, query: StopRunning) -> KeyView:
    database = box_of(request).database
    key = await keys.revoke(database, await keys.get(database, key_id), actor_of(request))
    return stop_requests(request, key) if query.now else key_view(key)


def stop_requests(request: Request, key: Key) -> KeyView:
    """Stop the running requests of a key that is revoked or blocked."""
    error = refusal(key)
    assert error is not None
    error.ordered = True
    stopped = box_of(request).requests.stop_key(key.id, error)
    return msgspec.structs.replace(key_view(key), stopped=stopped)


def with_warning(request: Request, view: View) -> View:
    """With a warning if the budget limits nothing."""
    text = warning(view.policy, box_of(request).config)
    return view if text is None else msgspec.structs.replace(view, warning=text)


def changed_policy(policy: Policy, changes: dict[str, Any]) -> Policy:
    """Raises InvalidBody."""
    try:
        return policies.changed(policy, changes)
    except msgspec.ValidationError as error:
        raise from_validation(error, "body", "policy") from error


def expiry(moment: datetime) -> int:
    """Unix milliseconds.  Raises InvalidBody."""
    seconds = moment.timestamp()
    if not 0 < seconds - time.time() <= LONGEST_LIFE:
        raise InvalidBody(
            "it must be in the future, and at most 36500d from now", loc=("body", "expires_at")
        )
    return round(seconds * 1000)
