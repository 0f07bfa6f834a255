"""`GET /v1/usage`: what an account (for an admin key: every account) has used, as JSON or CSV."""

from __future__ import annotations

from typing import Literal, cast

from msgspec import Struct
from starlette.requests import Request
from starlette.responses import Response

from pinaivu_box.admin.usage_report import UsageReport, parse_day, to_csv, usage_report
from pinaivu_box.box import Box
from pinaivu_box.errors import Forbidden, InvalidBody
from pinaivu_box.server.auth import key_of
from pinaivu_box.server.context import box_of, named_field
from pinaivu_box.store import accounts, keys
from pinaivu_box.store.keys import Key
from pinaivu_box.store.usage import BYS, By

_KEY_ID_CHARACTERS = len("key_") + 26


class UsageQuery(Struct, frozen=True, forbid_unknown_fields=True):
    """Days are in UTC, and `end_date` is included.  `account` and `key` are names or ids: an admin
    key may name any, others their own account and its keys.  The format `csv` is for links, which
    cannot send an `Accept` header."""

    start_date: str | None = None
    end_date: str | None = None
    model: str | None = None
    group_by: str | None = None
    account: str | None = None
    key: str | None = None
    format: Literal["json", "csv"] = "json"


async def get_usage(request: Request, query: UsageQuery) -> UsageReport | Response:
    box = box_of(request)
    columns = _columns(query.group_by)
    with named_field("query", "start_date"):
        start = None if query.start_date is None else parse_day(query.start_date)
    with named_field("query", "end_date"):
        end = None if query.end_date is None else parse_day(query.end_date)
    if start is not None and end is not None and end < start:
        raise InvalidBody("end_date is before start_date", loc=("query", "end_date"))
    account = await account_id(box, key_of(request), query.account)
    report = await usage_report(
        box.database,
        box.identity.node_id,
        box.config.pricing.currency,
        columns,
        account_id=account,
        key_id=None if query.key is None else await key_id(box, query.key, account),
        model=query.model,
        first_day=start,
        last_day=end,
    )
    if query.format == "csv":
        headers = {"content-disposition": 'attachment; filename="usage.csv"'}
        return Response(to_csv(report, columns), headers=headers, media_type="text/csv")
    if "text/csv" in request.headers.get("accept", ""):
        return Response(to_csv(report, columns), media_type="text/csv")
    return report


def _columns(text: str | None) -> tuple[By, ...]:
    """`"day,model"` as `("day", "model")`.  Raises InvalidBody."""
    names = [] if text is None else [part.strip() for part in text.split(",")]
    for name in names:
        if name not in BYS or names.count(name) > 1:
            raise InvalidBody(
                f"'{name[:50]}' is not among {', '.join(BYS)}, or is there twice",
                loc=("query", "group_by"),
            )
    return cast(tuple[By, ...], tuple(names))


async def account_id(box: Box, key: Key, name: str | None) -> str | None:
    """The account whose usage or receipts are wanted; None stands for all.  Raises Forbidden,
    NotFound."""
    if key.admin:
        return None if name is None else (await accounts.find(box.database, name)).id
    if name not in (None, key.account, key.account_id):
        raise Forbidden(f"This key sees its own account, {key.account}, and no other.")
    return key.account_id


async def key_id(box: Box, text: str, account_id: str | None) -> str:
    """The id of the key with that id or name; a name is looked for in the account, if one is given.
    Raises NotFound."""
    if text.startswith("key_") and len(text) == _KEY_ID_CHARACTERS:
        return text
    return (await keys.named(box.database, text, account_id)).id
