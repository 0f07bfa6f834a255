"""One-time links: setting a password by one, making them, and signing up."""

from __future__ import annotations

from typing import Annotated, Literal
from urllib.parse import quote

from msgspec import Meta, Struct
from starlette.requests import Request

from pinaivu_box.chats import data_keys
from pinaivu_box.errors import Conflict, Forbidden, NotFound, RateLimited
from pinaivu_box.server.context import actor_of, box_of
from pinaivu_box.server.json_response import JSON
from pinaivu_box.server.logins import (
    LoggedIn,
    NewPassword,
    begin_session,
    check_encrypted,
)
from pinaivu_box.server.paths import server_address
from pinaivu_box.server.sessions import address_of
from pinaivu_box.store import accounts, login_links
from pinaivu_box.store.audit import Actor
from pinaivu_box.text import utc_text

Token = Annotated[str, Meta(max_length=100)]


class UseLink(Struct, frozen=True):
    """The `token` of a one-time link, and the password that the account is to have."""

    token: Token
    password: NewPassword
    next: str = ""


class SignUp(Struct, frozen=True):
    """`invitation`: the token of an invitation, which is needed unless anybody may sign up."""

    name: Annotated[str, Meta(max_length=64)]
    password: NewPassword
    invitation: Token = ""


class LoginLink(Struct, frozen=True):
    """The link is shown only here, and works once."""

    url: str
    account: str | None
    expires_at: str
    request_id: str = ""


async def use_link(request: Request, body: UseLink) -> JSON[LoggedIn]:
    """Raises Forbidden, RowNotFound, InvalidValue for a password that is too short."""
    check_encrypted(request)
    box = box_of(request)
    link = await login_links.find(box.database, body.token)
    if link.account_id is None:
        raise NotFound("This is an invitation: open its own link to sign up.")
    account = await accounts.find(box.database, link.account_id)
    await login_links.use(box.database, link)
    by = Actor(account.id, address_of(request))
    await accounts.set_password(box.database, account, body.password, by)
    return await _begin(request, account.id, body.password, body.next)


async def sign_up(request: Request, body: SignUp) -> JSON[LoggedIn]:
    """Raises Forbidden, RateLimited, RowNotFound, InvalidValue, RowConflict if the name is
    taken."""
    check_encrypted(request)
    box, address = box_of(request), address_of(request)
    mode = box.config.login.signup
    if mode == "closed":
        raise Forbidden("Nobody can sign up here: ask an admin of this box for an account.")
    by = Actor("signup", address)
    if body.invitation:
        link = await login_links.find(box.database, body.invitation)
        if link.account_id is not None:
            raise NotFound("This is a link for a password: open it to set one.")
        account = await login_links.accept(box.database, link, body.name, body.password, by)
    elif mode == "open":
        if wait := box.signup_throttle.wait(address):
            raise RateLimited(
                "Too many accounts were made from your address: try again later.", retry_after=wait
            )
        accounts.check_name(body.name)
        box.signup_throttle.attempt(address)
        account = await accounts.create(box.database, body.name, "member", body.password, by)
    else:
        raise Forbidden("Signing up here needs an invitation: ask an admin of this box for one.")
    return await _begin(request, account.id, body.password)


async def _begin(
    request: Request, account_id: str, password: str, next_path: str = ""
) -> JSON[LoggedIn]:
    database = box_of(request).database
    account = await accounts.find(database, account_id)
    data_key = await data_keys.at_login(database, account_id, password)
    return await begin_session(request, account, data_key=data_key, next_path=next_path)


async def create_link(request: Request, account: str) -> LoginLink:
    """Raises RowNotFound."""
    database = box_of(request).database
    stored = await accounts.find(database, account)
    link, token = await login_links.create(database, stored, actor_of(request))
    return _view(request, "login/link/", token, stored.name, link.expires_at)


async def create_invitation(request: Request) -> LoginLink:
    """Raises Conflict where nobody can sign up, RowConflict for too many."""
    box = box_of(request)
    if box.config.login.signup == "closed":
        raise Conflict(
            "Nobody can sign up here: set signup = 'invite' under [login] in the configuration."
        )
    link, token = await login_links.invite(box.database, actor_of(request))
    return _view(request, "signup?invitation=", token, None, link.expires_at)


def _view(
    request: Request,
    path: Literal["login/link/", "signup?invitation="],
    token: str,
    account: str | None,
    expires_at: int,
) -> LoginLink:
    url = f"{server_address(request)}/{path}{quote(token)}"
    return LoginLink(url, account, utc_text(expires_at / 1000))
