"""What an account sees of itself: `/account`, `/usage`, `/keys`, `/receipts`, `/playground`."""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import Struct
from starlette.requests import Request
from starlette.responses import Response

from pinaivu_box.admin.overview import PERIODS
from pinaivu_box.admin.views import key_view
from pinaivu_box.box import Box
from pinaivu_box.errors import ApiError, Forbidden, StoreError
from pinaivu_box.membership import peer_names
from pinaivu_box.policy import MEMBER_SCOPES, SCOPES, Scope
from pinaivu_box.server.admin_events import name_of
from pinaivu_box.server.context import box_of
from pinaivu_box.server.pages.dashboard import charts_of, overview_of, period_of
from pinaivu_box.server.pages.render import page
from pinaivu_box.server.pages.shown import query_of
from pinaivu_box.server.paths import server_address
from pinaivu_box.server.sealed_data import get_sealed
from pinaivu_box.server.sessions import BrowserSession, require_login
from pinaivu_box.server.usage import key_id
from pinaivu_box.store import keys as stored_keys
from pinaivu_box.store import requests, sessions
from pinaivu_box.store.keys import Key
from pinaivu_box.store.requests import ListedReceipt
from pinaivu_box.store.times import now_ms, time_text

_MAX_KEYS = 1000  # of an account that are looked at
_MAX_LIMITED = 50  # keys whose limits are shown
_KEYS, _RECEIPTS = 25, 50  # on a page
# In this order: most browsers say that they are others too.
_BROWSERS = (
    ("Edg", "Edge"),
    ("OPR/", "Opera"),
    ("Firefox/", "Firefox"),
    ("Chrome/", "Chrome"),
    ("CriOS/", "Chrome"),
    ("Safari/", "Safari"),
)
_SYSTEMS = (
    ("Android", "Android"),
    ("iPhone", "iPhone"),
    ("iPad", "iPad"),
    ("Windows", "Windows"),
    ("Mac OS", "macOS"),
    ("CrOS", "ChromeOS"),
    ("Linux", "Linux"),
)
_MAX_SHOWN = 40


class OwnKeysQuery(Struct, frozen=True):
    """`after`: the last key of the page before."""

    after: str = ""


class ReceiptFilter(Struct, frozen=True):
    """As a form sends it; what is empty counts as absent."""

    model: str = ""
    key: str = ""
    after: str = ""


def _require(request: Request, scope: Scope) -> BrowserSession:
    """The session, if its key may do what the page does.  Raises LoginNeeded, Forbidden."""
    session = require_login(request)
    if scope not in session.key.policy.scopes and not session.is_admin:
        raise Forbidden(
            f"This page needs the scope '{scope}', which the key of your account for pages does "
            "not have: ask an admin."
        )
    return session


async def account(request: Request) -> Response:
    """Raises LoginNeeded."""
    own = require_login(request)
    found = await sessions.ls(box_of(request).database, own.account.id)
    return page(
        request,
        "account.html",
        own_session=own.session.id,
        sessions=found,
        browsers={one.id: browser_name(one.user_agent) for one in found},
        seals=await get_sealed(request),
    )


def browser_name(user_agent: str) -> str:
    """A browser and its system in a few words; what it says of itself, where it is unknown."""
    browser = next((name for mark, name in _BROWSERS if mark in user_agent), "")
    system = next((name for mark, name in _SYSTEMS if mark in user_agent), "")
    if not browser:
        return user_agent[:_MAX_SHOWN] or "unknown"
    return f"{browser} on {system}" if system else browser


async def usage(request: Request) -> Response:
    session, box, shown = _require(request, "usage"), box_of(request), period_of(request)
    now = now_ms()
    found = await overview_of(request, shown, ("model", "key"), session.account.id)
    own = await stored_keys.ls(box.database, session.account.id, limit=_MAX_KEYS)
    return page(
        request,
        "own/usage.html",
        periods=PERIODS,
        period=shown,
        overview=found,
        limits=await _limits(box, own, now),
        since=(time_text(found.moments[0].at) or "")[:10],
        used=any(key.requests for key in own),
        models=_models(box, session.key),
        server=server_address(request),
        **charts_of(found, box),
    )


async def keys(request: Request, query: OwnKeysQuery) -> Response:
    session, box = _require(request, "account"), box_of(request)
    own = await stored_keys.ls(box.database, session.account.id, limit=_MAX_KEYS)
    views = [key_view(key) for key in own if key.prefix]
    usable = [each for each in views if each.state in ("active", "blocked")]
    ended = [each for each in views if each not in usable]
    older = [each for each in usable if not query.after or each.id < query.after]  # newest first
    return page(
        request,
        "own/keys.html",
        usable=older[:_KEYS],
        any_usable=bool(usable),
        older=query_of(after=older[_KEYS - 1].id) if len(older) > _KEYS else "",
        newest="?" if query.after else "",
        ended=ended[:_KEYS],
        ended_count=len(ended),
        most=session.key.policy,
        most_until=session.key.expires_at,
        scopes=[scope for scope in SCOPES if scope in session.key.policy.scopes],
        member_scopes=MEMBER_SCOPES,
        models=_models(box, session.key),
        server=server_address(request),
    )


async def receipts(request: Request, query: ReceiptFilter) -> Response:
    session, box = _require(request, "receipts"), box_of(request)
    account, problem = session.account.id, ""
    rows: list[ListedReceipt] = []
    try:
        rows = await requests.list_receipts(
            box.database,
            account_id=account,
            key_id=await key_id(box, query.key, account) if query.key else None,
            model=query.model or None,
            after=query.after or None,
            limit=_RECEIPTS + 1,
        )
    except (ApiError, StoreError) as error:  # a filter that fits nothing
        problem = str(error)
    names = {**await peer_names.names(box.database), box.identity.node_id: "this box"}
    own = await stored_keys.ls(box.database, account, limit=_MAX_KEYS)
    return page(
        request,
        "own/receipts.html",
        receipts=[_receipt(row, names) for row in rows[:_RECEIPTS]],
        more=len(rows) > _RECEIPTS,
        problem=problem,
        query=query,
        keys=[(key.id, name_of(key)) for key in own],
        models=_models(box, session.key),
        server=server_address(request),
    )


async def playground(request: Request) -> Response:
    """A request to a model, with all that comes back.  Raises LoginNeeded."""
    session, box = require_login(request), box_of(request)
    aliases = [alias for alias, _ in box.admission.aliases(session.key.policy)]
    return page(request, "playground.html", models=_models(box, session.key) + aliases)


def _models(box: Box, key: Key) -> list[str]:
    return [model.id for model in box.admission.models(key.policy)]


def _receipt(row: ListedReceipt, names: dict[str, str]) -> dict[str, Any]:
    """What its line shows of the bytes that this box signed."""
    signed = msgspec.json.decode(row.signed)
    return {**signed, "key_name": row.key_name, "node_name": names.get(signed["node_id"], "")}


async def _limits(box: Box, own: list[Key], now: int) -> list[dict[str, Any]]:
    """The limits of keys that have some, and what is left of them now."""
    shown = []
    for key in own:
        policy = key.policy
        limited = (policy.rpm, policy.tpm, policy.max_parallel, policy.budget)
        if key.state(now) != "active" or not any(limited):
            continue
        left = await box.admission.headers(key) if policy.rpm or policy.tpm else {}
        entry: dict[str, Any] = {
            "name": name_of(key),
            "rpm": policy.rpm,
            "rpm_left": int(left.get("x-ratelimit-remaining-requests", 0)),
            "tpm": policy.tpm,
            "tpm_left": int(left.get("x-ratelimit-remaining-tokens", 0)),
            "max_parallel": policy.max_parallel,
            "budget": None,
        }
        if policy.budget is not None:
            begin, end = policy.budget.window(key.created_at, now)
            spent = key.spent_in(begin, end)
            entry["budget"] = policy.budget.units
            entry["budget_left"] = max(0, policy.budget.units - spent)
            entry["spent"], entry["renewed_at"] = spent, end
        shown.append(entry)
        if len(shown) == _MAX_LIMITED:
            break
    return shown
