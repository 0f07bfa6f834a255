"""`/login/oidc` and its callback: the browser goes to the provider, and comes back logged in."""

from __future__ import annotations

from typing import TYPE_CHECKING

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from pinaivu_box.box import Box
from pinaivu_box.errors import (
    ApiError,
    Conflict,
    NotFound,
    RowConflict,
    RowNotFound,
    SignOnForbidden,
)
from pinaivu_box.login import oidc
from pinaivu_box.login.oidc import Person
from pinaivu_box.server.context import box_of
from pinaivu_box.server.logins import check_encrypted, forget_ended, landing, new_session
from pinaivu_box.server.pages.render import HEADERS, page
from pinaivu_box.server.paths import forwarded_prefix, server_address
from pinaivu_box.server.sessions import address_of, check_origin, own_path, set_cookie
from pinaivu_box.store import account_identities, accounts, login_links, sessions
from pinaivu_box.store.accounts import Account
from pinaivu_box.store.audit import Actor

if TYPE_CHECKING:
    from pinaivu_box.login.provider import Provider

PATH = "/login/oidc"
CALLBACK = f"{PATH}/callback"
COOKIE = "pinaivu_sign_on"
_ACTOR = "single sign-on"
_MAX_LINK_CHARACTERS = 100
# The address of the callback holds the code: nobody is told where the browser came from.
_HEADERS = {"cache-control": "no-store", "referrer-policy": "no-referrer"}


async def begin(request: Request) -> Response:
    provider, asked = _provider(request), request.query_params
    wanted, link = own_path(asked.get("next", "")), asked.get("link", "")[:_MAX_LINK_CHARACTERS]
    try:
        check_encrypted(request)
        if link:  # it changes whose account this is: another site's page may not lead here
            check_origin("POST", request.headers)
        redirect_uri = f"{server_address(request)}{CALLBACK}"
        url, cookie = await box_of(request).sign_on.begin(provider, redirect_uri, wanted, link)
    except ApiError as error:
        return _failed(request, provider, error)
    response = RedirectResponse(url, 303, _HEADERS)
    _set_cookie(request, response, cookie, oidc.LIFE_SECONDS)
    return response


async def callback(request: Request) -> Response:
    provider, box = _provider(request), box_of(request)
    try:
        check_encrypted(request)
        person, attempt = await box.sign_on.end(
            provider, request.cookies.get(COOKIE, ""), request.query_params
        )
        await _check_allowed(box, provider, person, address_of(request))
        if attempt.link:
            await _use_link(box, attempt.link, person, address_of(request))
        account = await _account_of(box, provider, person, address_of(request))
        _, token = await new_session(request, account)
    except ApiError as error:
        response = _failed(request, provider, error)
    except (RowConflict, RowNotFound) as error:
        kind = Conflict if isinstance(error, RowConflict) else NotFound
        response = _failed(request, provider, kind(error.message))
    else:
        response = RedirectResponse(landing(request, account, attempt.next), 303, _HEADERS)
        set_cookie(request, response, token)
    _set_cookie(request, response, "", 0)  # it counts once
    return response


def _provider(request: Request) -> Provider:
    """Raises NotFound."""
    settings = box_of(request).settings.current
    login = settings.config.login.oidc
    provider = box_of(request).sign_on.provider(login, settings.oidc_secret)
    if provider is None:
        raise NotFound("This box has no single sign-on: log in with a password.")
    return provider


def _set_cookie(request: Request, response: Response, value: str, seconds: int) -> None:
    response.set_cookie(
        COOKIE,
        value,
        max_age=seconds,
        path=forwarded_prefix(request.headers) + PATH,
        secure=request.url.scheme == "https",
        httponly=True,
        samesite="lax",  # the provider's site sends the browser back
    )


async def _check_allowed(box: Box, provider: Provider, person: Person, address: str) -> None:
    """Raises SignOnForbidden; then nobody stays logged in to an account that they had before."""
    try:
        oidc.check_allowed(provider.config, person)
    except SignOnForbidden:
        by = Actor(_ACTOR, address)
        account = await account_identities.find(box.database, person.issuer, person.subject)
        if account is not None:
            await sessions.end_others(box.database, account.id, "", by)
            await forget_ended(box)
        raise


async def _use_link(box: Box, token: str, person: Person, address: str) -> None:
    """Make the person the first admin by the one-time link of the account `owner`, instead of a
    password.  Raises RowNotFound if the link does not work, Conflict if it is another account's or
    there is an admin."""
    found = await login_links.find(box.database, token)
    if found.account_id != accounts.OWNER or await accounts.admin_can_log_in(box.database):
        raise Conflict("This link sets a password: open it, and log in by that.")
    account = await accounts.find(box.database, accounts.OWNER)
    await login_links.use(box.database, found)
    by = Actor(_ACTOR, address)
    await account_identities.link(box.database, person.issuer, person.subject, account, by)
    await forget_ended(box)


async def _account_of(box: Box, provider: Provider, person: Person, address: str) -> Account:
    """The account of a person who may come in, made if there is none.

    Its role follows the provider's groups where the configuration says so.  Raises Forbidden,
    RowConflict.
    """
    database, by = box.database, Actor(_ACTOR, address)
    admin = oidc.is_admin(provider.config, person)
    account = await account_identities.find(database, person.issuer, person.subject)
    if account is None:
        return await account_identities.create_account(
            database,
            person.issuer,
            person.subject,
            oidc.account_names(person),
            "admin" if admin else "member",
            by,
        )
    if admin is not None and account.id != accounts.OWNER:
        if admin:
            await accounts.set_role(database, account, "admin", by)
        else:
            await accounts.demote(database, account, by)
            await forget_ended(box)
        account = await accounts.find(database, account.id)
    return account


def _failed(request: Request, provider: Provider, error: ApiError) -> Response:
    box = box_of(request)
    box.refusals.note("", "", error.code)
    shown = page(
        request,
        "sign_on_failed.html",
        status=error.status,
        message=error.message,
        provider=provider.config.name,
    )
    shown.headers.update({**HEADERS, **_HEADERS})
    return shown
