"""`GET /v1/usage`: what an account (for an admin key: everybody) has used, as JSON or CSV."""

from __future__ import annotations

import msgspec
from msgspec import Struct
from starlette.requests import Request
from starlette.responses import Response

from pinaivu_box.admin.usage import usage as report
from pinaivu_box.box import Box
from pinaivu_box.errors import Forbidden, InvalidBody
from pinaivu_box.server.auth import key_of
from pinaivu_box.server.envelope import JSON
from pinaivu_box.store import accounts, keys
from pinaivu_box.store.keys import Key
from pinaivu_box.store.usage_report import grouping, parse_day, to_csv

_ID = len("key_") + 26  # characters


class UsageQuery(Struct, frozen=True):
    """Days are UTC's, and the last is included.  `account` and `key`, by name or id, are for
    admins, `key` also for those of the same account."""

    start_date: str | None = None
    end_date: str | None = None
    model: str | None = None
    group_by: str | None = None
    account: str | None = None
    key: str | None = None


async def usage(request: Request) -> Response:
    box: Box = request.app.state.box
    asked, by = _query(request), grouping(request.query_params.get("group_by"))
    start, end = parse_day("start_date", asked.start_date), parse_day("end_date", asked.end_date)
    if start is not None and end is not None and end < start:
        raise InvalidBody("end_date is before start_date", loc=("query", "end_date"))
    account = await _account(box, key_of(request), asked.account)
    made = await report(
        box.database,
        box.identity.node_id,
        box.config.pricing.currency,
        by,
        account_id=account,
        key_id=None if asked.key is None else await key_id(box, asked.key, account),
        model=asked.model,
        first_day=start,
        last_day=end,
    )
    if "text/csv" in request.headers.get("accept", ""):
        return Response(to_csv(made, by), media_type="text/csv")
    request_id = request.scope["state"]["request_id"]
    return JSON(msgspec.structs.replace(made, request_id=request_id))


async def _account(box: Box, key: Key, asked: str | None) -> str | None:
    """Whose usage it is; None is everybody's.  Raises Forbidden, NotFound."""
    if key.admin:
        return None if asked is None else (await accounts.find(box.database, asked)).id
    if asked not in (None, key.account, key.account_id):
        raise Forbidden(f"This key sees the usage of its own account, {key.account}.")
    return key.account_id


async def key_id(box: Box, text: str, account_id: str | None) -> str:
    """The id of a key that is named by it, or by its name: of that account, if it is given.  Raises
    NotFound."""
    if text.startswith("key_") and len(text) == _ID:
        return text
    return (await keys.named(box.database, text, account_id)).id


def _query(request: Request) -> UsageQuery:
    given = dict(request.query_params)
    for name in given:
        if name not in UsageQuery.__struct_fields__:
            raise InvalidBody(
                f"'{name[:50]}' is not a parameter here: use "
                f"{', '.join(UsageQuery.__struct_fields__)}",
                loc=("query", name),
                kind="value_error.extra",
            )
    return msgspec.convert(given, UsageQuery)
