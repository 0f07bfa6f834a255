"""`/account`: the password, the sessions and the chats of whoever has logged in."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from pinaivu_box.server.context import box_of
from pinaivu_box.server.pages.render import page
from pinaivu_box.server.sealed_data import get_sealed
from pinaivu_box.server.sessions import require_login
from pinaivu_box.store import sessions

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
