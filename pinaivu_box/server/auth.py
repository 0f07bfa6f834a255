"""ASGI middleware: finds the API key of a request and checks its scope."""

from __future__ import annotations

import hmac
from collections.abc import Callable
from functools import partial

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Send
from starlette.types import Scope as AsgiScope

from pinaivu_box.box import Box
from pinaivu_box.errors import ApiError, Forbidden, Unauthorized
from pinaivu_box.gateway.admission import refusal
from pinaivu_box.policy import Policy
from pinaivu_box.server import error_responses
from pinaivu_box.store import keys
from pinaivu_box.store.keys import Key
from pinaivu_box.store.times import now_ms

# Commands on this home, which send the token in its run.json.
LOCAL = Key("local", "", "", "local commands", "", "", Policy(scopes=("admin",)), 0)
_READ_BY_ADMINS = ("usage", "receipts")  # scopes that a key with the scope admin need not have


class Authenticate:
    """Puts the key of a request into `scope["state"]["key"]`, and if it has limits of requests or
    tokens, what gives the headers about them into `scope["state"]["rate_limits"]`.

    `access_to` says by method and path which scope a request needs; "any key" stands for none,
    and "public" requests need no key.
    """

    def __init__(self, app: ASGIApp, box: Box, access_to: Callable[[str, str], str]) -> None:
        self._app = app
        self._box = box
        self._access_to = access_to

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"]
        access = self._access_to(scope["method"], path)
        if access != "public":
            try:
                key = await self._find(Headers(scope=scope))
                _check(key, access, scope)
            except ApiError as error:
                self._box.refusals.note("", "", error.code)
                adapted = error_responses.adapted(error, self._box.config.server.contact, path)
                await error_responses.response(adapted, path)(scope, receive, send)
                return
            scope["state"]["key"] = key
            if key.policy.rpm is not None or key.policy.tpm is not None:
                scope["state"]["rate_limits"] = partial(self._box.admission.headers, key)
        await self._app(scope, receive, send)

    async def _find(self, headers: Headers) -> Key:
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
        return key


def _check(key: Key, access: str, scope: AsgiScope) -> None:
    """Raises Forbidden."""
    address = scope["client"][0] if scope.get("client") else ""
    if not key.policy.admits(address):
        raise Forbidden(f"The API key {key.prefix}... may not be used from {address}.")
    if access == "any key" or access in key.policy.scopes or key is LOCAL:
        return
    if not (access in _READ_BY_ADMINS and key.admin):
        raise Forbidden(
            f"This needs a key with the scope '{access}'; the scopes of {key.prefix}... are: "
            f"{', '.join(key.policy.scopes) or 'none'}."
        )


def _secret(headers: Headers) -> str:
    value = headers.get("authorization")
    if not value:
        # Anthropic's clients send it this way.
        if secret := headers.get("x-api-key"):
            return secret
        raise Unauthorized(
            "The API key is missing: send it in the header 'Authorization: Bearer sk-pnv-...'."
        )
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


def require_account(request: Request) -> None:
    """Raises Forbidden for the token in run.json: inference is recorded in an account, and the
    token has none."""
    if key_of(request) is LOCAL:
        raise Forbidden("The token in run.json is for commands: use an API key for inference.")
