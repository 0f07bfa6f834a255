"""`/v1/admin/keys`: what `pinaivu keys` does, over HTTP."""

from __future__ import annotations

import time
from datetime import datetime
from typing import Annotated, Any

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType
from starlette.requests import Request
from starlette.responses import Response

from pinaivu_box import policy as policies
from pinaivu_box.admin import keys as operations
from pinaivu_box.errors import InvalidBody
from pinaivu_box.gateway.admission import refusal
from pinaivu_box.openai.request import from_validation
from pinaivu_box.policy import LONGEST_LIFE, Policy
from pinaivu_box.server.admin import Page, answer, body, box_of, by, query
from pinaivu_box.store import keys
from pinaivu_box.store.keys import OVERLAP, Key
from pinaivu_box.store.new_keys import Draft
from pinaivu_box.store.views import KeyView, key_view

Moment = Annotated[datetime, Meta(tz=True)]
Name = Annotated[str, Meta(max_length=200)]


class CreateKey(Struct, frozen=True):
    """Without an account the key gets one of its own; with the scope `admin`, the owner's."""

    name: Name = ""
    account: str | None = None
    policy: Policy = Policy()
    expires_at: Moment | None = None


class ChangeKey(Struct, frozen=True):
    """What is given is changed, also in the `policy` (fields of Policy), where null puts a setting
    back to its default.  `blocked` says why; null unblocks."""

    name: Name | UnsetType = UNSET
    policy: dict[str, Any] | UnsetType = UNSET
    expires_at: Moment | UnsetType | None = UNSET
    blocked: Annotated[str, Meta(min_length=1, max_length=200)] | UnsetType | None = UNSET


class RotateKey(Struct, frozen=True):
    """The secret of now works for so long ("24h"); "0" ends it at once."""

    overlap: str = OVERLAP


class KeyPage(Page, frozen=True):
    account: str | None = None


class AtOnce(Struct, frozen=True, forbid_unknown_fields=True):
    """`now`: running requests of the key are stopped too."""

    now: bool = False


class KeyList(Struct, frozen=True):
    data: list[KeyView]
    has_more: bool
    object: str = "list"
    request_id: str = ""


async def ls(request: Request) -> Response:
    page, database = query(request, KeyPage), box_of(request).database
    listed = await operations.ls(database, account=page.account, after=page.after, limit=page.limit)
    return answer(request, KeyList(listed.data, listed.has_more))


async def create(request: Request) -> Response:
    given, database = await body(request, CreateKey), box_of(request).database
    expires_at = None if given.expires_at is None else _expiry(given.expires_at)
    draft = Draft(given.name, given.account, given.policy, expires_at)
    return answer(request, _warned(request, await operations.create(database, draft, by(request))))


async def get(request: Request) -> Response:
    return answer(request, key_view(await _named(request)))


async def change(request: Request) -> Response:
    given, at_once = await body(request, ChangeKey), query(request, AtOnce)
    if at_once.now and not given.blocked:
        raise InvalidBody("now needs a reason in blocked", loc=("query", "now"))
    key = await _named(request)
    key = await keys.edit(
        box_of(request).database,
        key,
        by(request),
        name=None if given.name is UNSET else given.name,
        policy=None if given.policy is UNSET else _changed(key.policy, given.policy),
        expires_at=_expiry(moment) if isinstance(moment := given.expires_at, datetime) else moment,
        blocked=given.blocked,
    )
    shown = _stopped(request, key) if at_once.now else key_view(key)
    return answer(request, _warned(request, shown))


async def rotate(request: Request) -> Response:
    given, database = await body(request, RotateKey, empty=b"{}"), box_of(request).database
    try:
        overlap = operations.parse_overlap(given.overlap)
    except ValueError as error:
        raise InvalidBody(str(error), loc=("body", "overlap")) from None
    key = await _named(request)
    return answer(request, await operations.rotate(database, key, overlap, by(request)))


async def revoke(request: Request) -> Response:
    at_once = query(request, AtOnce)
    key = await keys.revoke(box_of(request).database, await _named(request), by(request))
    return answer(request, _stopped(request, key) if at_once.now else key_view(key))


async def _named(request: Request) -> Key:
    """By its id alone: secrets do not belong into addresses.  Raises NotFound."""
    return await keys.get(box_of(request).database, request.path_params["key_id"])


def _stopped(request: Request, key: Key) -> KeyView:
    """Stops what runs for a key that is revoked or blocked."""
    error = refusal(key)
    if error is not None:
        error.ordered = True
    stopped = 0 if error is None else box_of(request).requests.stop_key(key.id, error)
    return msgspec.structs.replace(key_view(key), stopped=stopped)


def _warned(request: Request, shown: KeyView) -> KeyView:
    """With a warning if its budget holds nothing back."""
    text = operations.warning(shown.policy, box_of(request).config.pricing)
    return msgspec.structs.replace(shown, warning=UNSET if text is None else text)


def _changed(policy: Policy, changes: dict[str, Any]) -> Policy:
    try:
        return policies.changed(policy, changes)
    except msgspec.ValidationError as error:
        wrong = from_validation(error)
        loc = ("body", "policy", *wrong.loc[1:])
        raise InvalidBody(wrong.message, loc=loc, kind=wrong.kind) from error


def _expiry(moment: datetime) -> int:
    """Unix milliseconds.  Raises InvalidBody."""
    seconds = moment.timestamp()
    if not 0 < seconds - time.time() <= LONGEST_LIFE:
        raise InvalidBody("it is in the past, or over 36500d away", loc=("body", "expires_at"))
    return round(seconds * 1000)
