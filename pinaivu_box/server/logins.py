"""`/v1/session`: logging in and out."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct
from starlette.datastructures import Headers
from starlette.requests import Request

from pinaivu_box.admin.views import AccountView, account_view
from pinaivu_box.box import Box
from pinaivu_box.chats import data_keys
from pinaivu_box.errors import Forbidden, LoginFailed, RateLimited, RowNotFound
from pinaivu_box.gateway.admission import refusal
from pinaivu_box.server.anonymous import forwarded_by
from pinaivu_box.server.context import box_of
from pinaivu_box.server.json_response import JSON
from pinaivu_box.server.paths import PREFIX_HEADER, forwarded_prefix
from pinaivu_box.server.sessions import (
    address_of,
    delete_cookie,
    is_loopback,
    own_path,
    session_of,
    set_cookie,
    start_page,
)
from pinaivu_box.store import accounts, pages_keys, sessions
from pinaivu_box.store.accounts import Account
from pinaivu_box.store.audit import Actor
from pinaivu_box.store.sessions import Session

_MAX_AT_ONCE = 32  # logins that wait for one of the two threads that check passwords
Password = Annotated[str, Meta(max_length=1024)]
NewPassword = Annotated[str, Meta(min_length=8, max_length=1024)]
_WRONG = "The name or the password is wrong."


class Login(Struct, frozen=True):
    """`next`: the path of a page of this box, where the browser wants to go."""

    name: Annotated[str, Meta(max_length=200)]
    password: Password
    next: str = ""


class LoggedIn(Struct, frozen=True):
    """The cookie holds the session.  Changes need `csrf` in the header x-csrf-token; `next` is the
    path to go to."""

    account: AccountView
    session_id: str
    csrf: str
    next: str


class LoggedOut(Struct, frozen=True):
    ended: bool
    request_id: str = ""


async def log_in(request: Request, body: Login) -> JSON[LoggedIn]:
    check_encrypted(request)
    box, address = box_of(request), address_of(request)
    name = body.name if accounts.is_name(body.name) else ""
    account, hashed = await check_password(box, name, body.password, address)
    data_key = await data_keys.at_login(box.database, account.id, body.password)
    return await begin_session(
        request, account, hashed=hashed, data_key=data_key, next_path=body.next
    )


async def log_out(request: Request) -> JSON[LoggedOut]:
    found = session_of(request)
    if found is not None:
        box, account = box_of(request), found.account
        by = Actor(account.id, address_of(request))
        box.session_keys.drop(found.session.id)
        await sessions.end(box.database, found.session.id, account.id, by)
    response = JSON[LoggedOut](LoggedOut(found is not None))
    delete_cookie(request, response)
    return response


async def check_password(box: Box, name: str, password: str, address: str) -> tuple[Account, str]:
    """The account, and the stored hash of its password.  Raises RateLimited, LoginFailed."""
    await check_throttle(box, name, address)
    if box.logins_running >= _MAX_AT_ONCE:
        raise RateLimited("Many people are logging in now: try again in a few seconds.")
    box.login_throttle.attempt(name, address)
    box.logins_running += 1
    try:
        verified = await accounts.verify_password(box.database, name, password)
    finally:
        box.logins_running -= 1
    if verified is None:
        raise LoginFailed(_WRONG)
    box.login_throttle.succeeded(name, address)
    return verified


async def check_throttle(box: Box, name: str, address: str) -> None:
    """Raises RateLimited if there were too many failures."""
    known = await sessions.has_begun(box.database, name, address)
    if wait := box.login_throttle.wait(name, address, known=known):
        raise RateLimited(
            f"There were too many attempts to log in: try again in {wait} seconds.",
            retry_after=wait,
        )


async def begin_session(
    request: Request,
    account: Account,
    *,
    hashed: str | None = None,
    data_key: bytes | None = None,
    next_path: str = "",
) -> JSON[LoggedIn]:
    """As `new_session`, as the answer with the cookie."""
    session, token = await new_session(request, account, hashed=hashed, data_key=data_key)
    response = JSON[LoggedIn](logged_in(request, account, session, next_path))
    set_cookie(request, response, token)
    return response


async def new_session(
    request: Request,
    account: Account,
    *,
    hashed: str | None = None,
    data_key: bytes | None = None,
) -> tuple[Session, str]:
    """Begin a session of an account and end the one that the browser had, so that a cookie from
    before is never taken over.  Returns it with the token for the cookie.

    With `hashed`, the hash of a password, only if that has not changed meanwhile.  `data_key` opens
    the account's chats in it.  Raises LoginFailed, Forbidden, what the refusal of the pages key is.
    """
    box, address = box_of(request), address_of(request)
    key = await pages_keys.of(box.database, account, Actor(account.id, address))
    if (why := refusal(key)) is not None:
        raise why
    if not key.policy.admits(address):
        raise Forbidden(f"{account.name} may not log in from {address}.")
    await _end_former(request)
    try:
        session, token = await sessions.create(
            box.database,
            account.id,
            address=address,
            user_agent=request.headers.get("user-agent", ""),
            password=hashed,
        )
    except RowNotFound as error:
        raise LoginFailed(error.message) from error
    await forget_ended(box)
    if data_key is not None:
        box.session_keys.put(session.id, data_key)
    return session, token


async def forget_ended(box: Box) -> None:
    """Drop the keys of sessions that have ended."""
    await box.session_keys.drop_ended(box.database)


async def _end_former(request: Request) -> None:
    """End the session that the browser has already, if any."""
    if (former := session_of(request)) is None:
        return
    box = box_of(request)
    box.session_keys.drop(former.session.id)
    await box.database.write(sessions.end_one(former.session.id))


def logged_in(request: Request, account: Account, session: Session, next_path: str) -> LoggedIn:
    path = landing(request, account, next_path)
    return LoggedIn(account_view(account), session.id, session.csrf, path)


def landing(request: Request, account: Account, next_path: str) -> str:
    """Where the browser goes after a login: the page that it wanted, or the account's first."""
    prefix, path = forwarded_prefix(request.headers), own_path(next_path) or start_page(account)
    return path if f"{path}/".startswith(f"{prefix}/") else prefix + path


def check_encrypted(request: Request) -> None:
    """Raises Forbidden if a password would cross a network that others can read."""
    if not may_log_in(request):
        raise Forbidden(
            "This box takes passwords from other machines over https:// only, since others on the "
            "network can read plain HTTP: set up TLS, name the proxy that does it in "
            "trusted_proxies, or set allow_plain_login = true, all under [server]."
        )


def may_log_in(request: Request) -> bool:
    return is_private(request) or box_of(request).config.server.allow_plain_login


def is_private(request: Request) -> bool:
    """Whether nobody between the browser and this box can read what they say."""
    if request.url.scheme == "https":
        return True
    address, server = address_of(request), request.scope.get("server")
    same_machine = is_loopback(address) or (server is not None and server[0] == address)
    return same_machine and not _came_by_proxy(request)


def _came_by_proxy(request: Request) -> bool:
    """Whether a proxy that is not trusted forwards the request: who knows from where."""
    headers = request.headers
    if box_of(request).config.server.trusted_proxies:  # `proxies` has left what theirs say of paths
        others = {name: value for name, value in headers.items() if name != PREFIX_HEADER}
        headers = Headers(others)
    return bool(forwarded_by(headers))
