"""ASGI middleware: finds the API key or the session of a request and checks its scope."""

from __future__ import annotations

import contextlib
import hmac
import sqlite3
from collections.abc import Callable
from functools import partial

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Send
from starlette.types import Scope as AsgiScope

from pinaivu_box.box import Box
from pinaivu_box.errors import ApiError, Forbidden, SessionEnded, Unauthorized
from pinaivu_box.gateway.admission import refusal
from pinaivu_box.policy import Policy
from pinaivu_box.server import anonymous, sessions
from pinaivu_box.server.sessions import BrowserSession
from pinaivu_box.store import accounts, keys
from pinaivu_box.store.accounts import Account
from pinaivu_box.store.keys import Key
from pinaivu_box.store.times import now_ms

# Commands on this home, which send the token in its run.json.
LOCAL = Key("local", "", "", "local commands", "", "", Policy(scopes=("admin",)), 0)
_READ_BY_ADMINS = ("usage", "receipts")  # scopes that a key with the scope admin need not have


class Authenticate:
    """Puts the key of a request into `scope["state"]["key"]`, and if it has limits of requests or
    tokens, what gives the headers about them into `scope["state"]["rate_limits"]`.

    A request with the cookie of a session and without another credential has its pages key, and
    the session in `scope["state"]["session"]`.

    `access_to` says by method and path which scope a request needs; "any key" stands for none,
    "public" requests need no key, and "page" requests need none either, but have their session;
    so do "explorer" requests where the explorer is public.  `refused` makes the answer of an error.
    """

    def __init__(
        self,
        app: ASGIApp,
        box: Box,
        access_to: Callable[[str, str], str],
        refused: Callable[[AsgiScope, ApiError], ASGIApp],
    ) -> None:
        self._app = app
        self._box = box
        self._access_to = access_to
        self._refused = refused

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"]
        access = self._access_to(scope["method"], path)
        if access != "public":
            try:
                headers = Headers(scope=scope)
                if access == "page" or (access == "explorer" and self._is_public(headers)):
                    key = await self._find_for_page(headers, scope)
                else:
                    key = await self._find(headers, scope)
                    _check(key, "receipts" if access == "explorer" else access, scope)
            except ApiError as error:
                self._box.refusals.note("", "", error.code)
                await self._refused(scope, error)(scope, receive, send)
                return
            if key is not None:
                scope["state"]["key"] = key
            if key is not None and (key.policy.rpm is not None or key.policy.tpm is not None):
                scope["state"]["rate_limits"] = partial(self._box.admission.headers, key)
        await self._app(scope, receive, send)

    def _is_public(self, headers: Headers) -> bool:
        """Whether the explorer is open to a request with these headers, whoever sends it."""
        public = self._box.config.explorer.access == "public"
        return public and not anonymous.has_credential(headers)

    async def _find_for_page(self, headers: Headers, scope: AsgiScope) -> Key | None:
        """The pages key of the session, None if there is no session or its key may not be used.
        Raises CrossSite."""
        session = await sessions.find(self._box, headers)
        if session is not None and _usable(session.key, scope):
            sessions.check_csrf(scope["method"], headers, session.session)
            return _in_session(scope, session)
        sessions.check_origin(scope["method"], headers)
        return None

    async def _find(self, headers: Headers, scope: AsgiScope) -> Key:
        if not anonymous.has_credential(headers):
            if (session := await sessions.find(self._box, headers)) is not None:
                sessions.check_csrf(scope["method"], headers, session.session)
                if (error := refusal(session.key)) is not None:
                    raise error
                return _in_session(scope, session)
            if sessions.token_in(headers) and not self._box.config.server.anonymous_key.key:
                raise SessionEnded("Your session has ended: log in again.")
            config = self._box.config.server.anonymous_key
            anonymous.check(config, headers, scope["scheme"], _address(scope))
            key = await anonymous.find(config, self._box.database)
            if (error := refusal(key)) is not None:
                raise error
            return key
        secret = _secret(headers)
        if hmac.compare_digest(secret.encode(), self._box.control_token.encode()):
            return LOCAL
        if not keys.well_formed(secret):
            raise Unauthorized(
                "The API key is malformed (mistyped or cut off): it consists of sk-pnv- and "
                "44 letters and digits."
            )
        match = await keys.find(self._box.database, secret)
        if match is None:
            raise Unauthorized("The API key is unknown to this box: create one with 'keys create'.")
        key, is_old = match
        if (error := refusal(key)) is not None:
            raise error
        now = now_ms()
        if is_old and (key.old_until or 0) <= now:
            raise Unauthorized(f"The API key has been rotated: use {key.prefix}...{key.last_four}.")
        if key.transcript_key is None and not is_old:
            with contextlib.suppress(sqlite3.Error):  # the next request tries again
                return await keys.keep_transcript_key(self._box.database, key, secret)
        return key


def _usable(key: Key, scope: AsgiScope) -> bool:
    return refusal(key) is None and key.policy.admits(_address(scope))


def _in_session(scope: AsgiScope, session: BrowserSession) -> Key:
    scope["state"]["session"] = session
    return session.key


def _check(key: Key, access: str, scope: AsgiScope) -> None:
    """Raises Forbidden."""
    address = _address(scope)
    if not key.policy.admits(address):
        raise Forbidden(f"The API key {key.label} may not be used from {address}.")
    if access == "any key" or access in key.policy.scopes or key is LOCAL:
        return
    if not (access in _READ_BY_ADMINS and key.admin):
        raise Forbidden(
            f"This needs a key with the scope '{access}'; the scopes of {key.label} are: "
            f"{', '.join(key.policy.scopes) or 'none'}."
        )


def _address(scope: AsgiScope) -> str:
    return str(scope["client"][0]) if scope.get("client") else ""


def _secret(headers: Headers) -> str:
    value = headers.get("authorization")
    if not value:
        # Anthropic's clients send it this way.
        if secret := headers.get("x-api-key"):
            return secret
        raise Unauthorized(f"{anonymous.MISSING}.")
    scheme, _, secret = value.partition(" ")
    secret = secret.strip(" \t")
    if scheme.lower() != "bearer" or not secret:
        raise Unauthorized(
            "The Authorization header is malformed: write it as 'Bearer sk-pnv-...'."
        )
    return secret


def key_of(request: Request) -> Key:
    key: Key = request.scope["state"]["key"]
    return key


async def account_of(request: Request) -> Account:
    """The account of the session or of the key.  Raises Forbidden for the token in run.json."""
    key = key_of(request)
    if key is LOCAL:
        raise Forbidden("The token in run.json is for commands, and belongs to no account.")
    return await accounts.find(request.app.state.box.database, key.account_id)


def require_account(request: Request) -> None:
    """Raises Forbidden for the token in run.json: inference is recorded in an account, and the
    token has none."""
    if key_of(request) is LOCAL:
        raise Forbidden("The token in run.json is for commands: use an API key for inference.")
