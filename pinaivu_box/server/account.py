"""`/v1/account`: what an account says of itself and changes by itself, and its sessions."""

from __future__ import annotations

from msgspec import Struct
from starlette.requests import Request

from pinaivu_box.admin.views import AccountView, KeyView, account_view, key_view
from pinaivu_box.chats import data_keys
from pinaivu_box.errors import LoginFailed, RowConflict, WrongSecret
from pinaivu_box.server.auth import account_of
from pinaivu_box.server.context import actor_of, box_of
from pinaivu_box.server.json_response import JSON
from pinaivu_box.server.logins import (
    LoggedIn,
    NewPassword,
    Password,
    check_encrypted,
    check_password,
    forget_ended,
    logged_in,
    new_session,
)
from pinaivu_box.server.paging import ListAnswer
from pinaivu_box.server.sessions import address_of, require_session, session_of, set_cookie
from pinaivu_box.store import accounts, pages_keys, sessions
from pinaivu_box.store.sessions import Session
from pinaivu_box.text import utc_text


class OwnAccount(Struct, frozen=True):
    """`pages_key`: what the pages may do, which an admin limits; the account's own keys may do no
    more."""

    account: AccountView
    pages_key: KeyView
    request_id: str = ""


class ChangePassword(Struct, frozen=True):
    """All sessions end; the one that changes it gets a new cookie and a new CSRF token."""

    current: Password
    new: NewPassword


class ChangedPassword(Struct, frozen=True):
    """`session`: null if it was changed with an API key."""

    session: LoggedIn | None
    request_id: str = ""


class SessionView(Struct, frozen=True):
    """`current`: the session that asks."""

    id: str
    created_at: str
    last_seen: str
    address: str
    user_agent: str
    current: bool


class SessionList(ListAnswer, frozen=True):
    """The newest first."""

    data: list[SessionView]


class EndedSessions(Struct, frozen=True):
    ended: int
    request_id: str = ""


async def get_account(request: Request) -> OwnAccount:
    account, database = await account_of(request), box_of(request).database
    key = await pages_keys.of(database, account, actor_of(request))
    return OwnAccount(account_view(account), key_view(key))


async def change_password(request: Request, body: ChangePassword) -> JSON[ChangedPassword]:
    """Raises RateLimited, WrongSecret, Forbidden."""
    check_encrypted(request)
    box, account = box_of(request), await account_of(request)
    try:
        _, checked = await check_password(box, account.name, body.current, address_of(request))
    except LoginFailed as error:
        raise WrongSecret(
            "That is not the password of your account; if you forgot it, an admin can make a link "
            "that sets another one."
        ) from error
    state = await data_keys.state_of(box.database, account.id)
    data_key = await data_keys.at_login(box.database, account.id, body.current)
    rewrapped = []
    if data_key is not None and state.sealed in ("password", None):
        rewrapped.append(await data_keys.rewrapped(account.id, data_key, body.new))
    try:
        hashed = await accounts.change_password(
            box.database, account, body.new, actor_of(request), *rewrapped, checked=checked
        )
    except RowConflict as error:
        raise WrongSecret(error.message) from error
    await forget_ended(box)
    if session_of(request) is None:
        return JSON[ChangedPassword](ChangedPassword(None))
    account = await accounts.find(box.database, account.id)
    session, token = await new_session(request, account, hashed=hashed, data_key=data_key)
    response = JSON[ChangedPassword](ChangedPassword(logged_in(request, account, session, "")))
    set_cookie(request, response, token)
    return response


async def list_sessions(request: Request) -> SessionList:
    own = require_session(request)
    found = await sessions.ls(box_of(request).database, own.account.id)
    return SessionList([_view(one, own.session) for one in found])


async def end_session(request: Request, session_id: str) -> EndedSessions:
    """Raises RowNotFound."""
    own, box = require_session(request), box_of(request)
    await sessions.end(box.database, session_id, own.account.id, actor_of(request))
    box.session_keys.drop(session_id)
    return EndedSessions(1)


async def end_other_sessions(request: Request) -> EndedSessions:
    own, box = require_session(request), box_of(request)
    ended = await sessions.end_others(
        box.database, own.account.id, own.session.id, actor_of(request)
    )
    await forget_ended(box)
    return EndedSessions(ended)


def _view(session: Session, own: Session) -> SessionView:
    created, seen = utc_text(session.created_at / 1000), utc_text(session.last_seen / 1000)
    return SessionView(
        session.id, created, seen, session.address, session.user_agent, session.id == own.id
    )
