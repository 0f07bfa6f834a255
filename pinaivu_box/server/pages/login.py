"""`/login`, `/login/link/...`, `/signup` and `/logout`."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from pinaivu_box.chats import data_keys
from pinaivu_box.errors import RowNotFound
from pinaivu_box.login_config import OidcConfig
from pinaivu_box.server.context import box_of
from pinaivu_box.server.logins import is_private, may_log_in
from pinaivu_box.server.pages.render import page
from pinaivu_box.server.paths import forwarded_prefix
from pinaivu_box.server.sessions import own_path, session_of, start_page
from pinaivu_box.store import accounts, login_links
from pinaivu_box.store.accounts import Account


async def login(request: Request) -> Response:
    wanted = own_path(request.query_params.get("next", ""))
    if (session := session_of(request)) is not None:
        path = wanted or start_page(session.account)
        return RedirectResponse(
            forwarded_prefix(request.headers) + path, 303, {"cache-control": "no-store"}
        )
    box = box_of(request)
    config = box.config.login
    # Whom a provider logs in is a member, unless its groups say otherwise: there is no admin yet.
    ownerless = bool(
        config.oidc.issuer
        and not config.oidc.admin_groups
        and not await accounts.admin_can_log_in(box.database)
    )
    return page(
        request,
        "login.html",
        next=wanted,
        signup=config.signup,
        oidc=config.oidc,
        ownerless=ownerless,
        **_way(request),
    )


async def link(request: Request, token: str) -> Response:
    """The link stays unused: programs that look at links in messages open them too."""
    database = box_of(request).database
    try:
        found = await login_links.find(database, token)
        owner = found.account_id and await accounts.find(database, found.account_id)
    except RowNotFound:
        owner = None
    if not owner:
        return page(request, "link_used.html", status=404)
    seals = await data_keys.state_of(database, owner.id)
    locks = owner.has_password and seals.sealed == "password"
    return page(
        request,
        "link.html",
        owner=owner,
        locks=locks,
        will_seal=not seals.sealed,
        oidc=await _provider_for_owner(request, owner),
        token=token,
        **_way(request),
    )


async def _provider_for_owner(request: Request, account: Account) -> OidcConfig | None:
    """The provider by which the first admin may log in instead of choosing a password."""
    box = box_of(request)
    config = box.config.login.oidc
    first = account.id == accounts.OWNER and not await accounts.admin_can_log_in(box.database)
    return config if config.issuer and first else None


async def signup(request: Request) -> Response:
    box, token = box_of(request), request.query_params.get("invitation", "")
    mode, valid = box.config.login.signup, False
    if token and mode != "closed":
        try:
            valid = (await login_links.find(box.database, token)).account_id is None
        except RowNotFound:
            valid = False
    possible = valid if token else mode == "open"
    return page(
        request,
        "signup.html",
        status=200 if possible else 404,
        mode=mode,
        token=token,
        possible=possible,
        **_way(request),
    )


async def logout(request: Request) -> Response:
    return page(request, "logout.html")


def _way(request: Request) -> dict[str, bool]:
    """What pages with a password have to say of the way to this box."""
    return {"private": is_private(request), "allowed": may_log_in(request)}
