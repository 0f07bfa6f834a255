"""`/admin/audit`: who changed what, when, from where."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import msgspec
from msgspec import Struct
from starlette.requests import Request
from starlette.responses import HTMLResponse

from pinaivu_box.server import admin_audit
from pinaivu_box.server.admin_audit import AuditQuery
from pinaivu_box.server.pages.render import page
from pinaivu_box.server.pages.shown import shown_list
from pinaivu_box.server.sessions import require_admin
from pinaivu_box.text import number

_PAGE = 100
_FILTERS = ("actor", "action", "target", "since", "until")
# What can be chosen as an action: all actions on a kind of thing begin with its name.
ACTIONS = ("key", "account", "peer", "model", "ledger", "login", "session")


class AuditPageQuery(Struct, frozen=True):
    """As `AuditQuery`, as a form sends it; `until` is a day that is not included."""

    actor: str = ""
    action: str = ""
    target: str = ""
    since: str = ""
    until: str = ""
    after: str = ""


async def audit(request: Request, query: AuditPageQuery) -> HTMLResponse:
    require_admin(request)
    filters = {name: getattr(query, name) for name in _FILTERS}
    wanted = AuditQuery(limit=_PAGE, after=number(query.after), **filters)
    listing = admin_audit.list_audit_entries(request, wanted)
    return page(
        request,
        "admin/audit.html",
        listed=await shown_list(listing, filters, query.after),
        lines_of=lines_of,
        query=query,
        actions=ACTIONS,
        filtered=any(filters.values()),
    )


def lines_of(detail: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What was set, as names and values; of a change only what differs."""
    before, after = detail.get("before"), detail.get("after")
    if not isinstance(before, Mapping) or not isinstance(after, Mapping):
        yield from ((name, _text(value)) for name, value in _flat(detail) if value is not None)
        return
    old, new = dict(_flat(before)), dict(_flat(after))
    for name in {**old, **new}:
        if old.get(name) != new.get(name):
            yield name, f"{_text(old.get(name))} → {_text(new.get(name))}"


def _flat(detail: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """With the settings of a policy beside the others."""
    for name, value in detail.items():
        if name == "policy" and isinstance(value, Mapping):
            yield from value.items()
        else:
            yield name, value


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(each, str) for each in value):
        return ", ".join(value) or "none"
    return "none" if value is None else msgspec.json.encode(value).decode()
