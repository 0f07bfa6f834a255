"""The session of a browser: its cookie, what it may do, and what keeps other sites out.

A request with the cookie and without another credential has the rights of the account's pages key
(`store/pages_keys`).  Whatever it changes needs the session's CSRF token in a header, which only
pages of this box can know.
"""

from __future__ import annotations

import contextlib
import hmac
import ipaddress
import sqlite3
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response

from pinaivu_box.box import Box
from pinaivu_box.errors import CrossSite, Forbidden, LoginNeeded, SessionEnded, StoreError
from pinaivu_box.server.paths import forwarded_prefix
from pinaivu_box.store import accounts, pages_keys, sessions
from pinaivu_box.store.accounts import Account
from pinaivu_box.store.audit import BOX
from pinaivu_box.store.keys import Key
from pinaivu_box.store.sessions import Session
from pinaivu_box.store.times import now_ms

COOKIE = "pinaivu_session"
CSRF_HEADER = "x-csrf-token"
SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
_NOTED_EVERY = 300_000  # milliseconds: how exactly it is known when a session was used last
_MAX_NEXT_CHARACTERS = 2000


@dataclass(frozen=True)
class BrowserSession:
    """`key` is the account's pages key.  `data_key` opens the account's sealed data; None if it has
    none, or was not unwrapped in this session."""

    session: Session
    account: Account
    key: Key
    data_key: bytes | None

    @property
    def is_admin(self) -> bool:
        return self.key.admin


def session_of(request: Request) -> BrowserSession | None:
    found: BrowserSession | None = request.scope["state"].get("session")
    return found


def require_session(request: Request) -> BrowserSession:
    """For endpoints.  Raises SessionEnded."""
    if (found := session_of(request)) is None:
        raise SessionEnded("This needs a session: log in on the page /login.")
    return found


def require_login(request: Request) -> BrowserSession:
    """For pages: a browser without a session is sent to the login.  Raises LoginNeeded."""
    if (found := session_of(request)) is None:
        raise LoginNeeded("Log in first.")
    return found


def require_admin(request: Request) -> BrowserSession:
    """For pages.  Raises LoginNeeded, Forbidden."""
    found = require_login(request)
    if not found.is_admin:
        raise Forbidden("This page is for admins: log in to an admin's account.")
    return found


def token_in(headers: Headers) -> str:
    """That of the session's cookie; "" if there is none."""
    for part in headers.get("cookie", "").split(";"):
        name, _, value = part.strip().partition("=")
        if name == COOKIE and value:
            return value
    return ""


async def find(box: Box, headers: Headers) -> BrowserSession | None:
    """The session whose cookie a request brings."""
    token = token_in(headers)
    session = await sessions.find(box.database, token) if token else None
    if session is None:
        return None
    if now_ms() - session.last_seen > _NOTED_EVERY:
        with contextlib.suppress(sqlite3.Error):  # it is valid, whether or not this can be noted
            await sessions.seen(box.database, session.id)
    try:
        account = await accounts.find(box.database, session.account_id)
        key = await pages_keys.of(box.database, account, BOX)
    except StoreError:  # the account was removed meanwhile
        return None
    return BrowserSession(session, account, key, box.session_keys.get(session.id))


def check_csrf(method: str, headers: Headers, session: Session) -> None:
    """Raises CrossSite for a change without the session's token."""
    token = headers.get(CSRF_HEADER, "")
    if method in SAFE_METHODS or hmac.compare_digest(token.encode(), session.csrf.encode()):
        return
    raise CrossSite(
        f"A change in a session needs the header {CSRF_HEADER} with the token that its pages hold: "
        "reload the page, or use an API key."
    )


def check_origin(method: str, headers: Headers) -> None:
    """Raises CrossSite for a change that a page of another site has the browser send."""
    if method in SAFE_METHODS:
        return
    if (site := headers.get("sec-fetch-site")) is not None:
        own = site in ("same-origin", "none")
    else:  # browsers leave it out where a page came over plain HTTP; programs send neither
        own = all(
            _host_of(origin) == headers.getlist("host") for origin in headers.getlist("origin")
        )
    if not own:
        raise CrossSite(
            "This was sent by a page of another site: open the page of this box.  Behind a proxy, "
            "let it pass the header Host."
        )


def _host_of(origin: str) -> list[str]:
    try:
        return [urlsplit(origin).netloc]
    except ValueError:
        return []


def set_cookie(request: Request, response: Response, token: str) -> None:
    _set_cookie(request, response, token, sessions.LIFE // 1000)


def delete_cookie(request: Request, response: Response) -> None:
    _set_cookie(request, response, "", 0)


def _set_cookie(request: Request, response: Response, value: str, max_age: int) -> None:
    response.set_cookie(
        COOKIE,
        value,
        max_age=max_age,
        path=forwarded_prefix(request.headers) or "/",
        secure=request.url.scheme == "https",
        httponly=True,
        samesite="lax",
    )


def address_of(request: Request) -> str:
    return request.client.host if request.client else ""


def is_loopback(address: str) -> bool:
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    mapped = ip.ipv4_mapped if isinstance(ip, ipaddress.IPv6Address) else None
    return (mapped or ip).is_loopback


def own_path(text: str) -> str:
    """The path of a page of this box, to go to after the login; "" for anything else."""
    if not text.startswith("/") or text.startswith("//") or len(text) > _MAX_NEXT_CHARACTERS:
        return ""
    # Browsers read a backslash as a slash, and drop tabs and newlines.
    return "" if "\\" in text or not text.isascii() or not text.isprintable() else text


def start_page(account: Account) -> str:
    return "/dashboard" if account.role == "admin" else "/chat"
