"""Who asks?  Pure ASGI: `/v1` needs a key, which ends up in `scope["state"]["key"]`."""

from __future__ import annotations

import hmac
import time

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from pinaivu_box.box import Box
from pinaivu_box.errors import ApiError, Forbidden, Unauthorized
from pinaivu_box.server import envelope
from pinaivu_box.store import keys
from pinaivu_box.store.keys import Key

# The commands on this home, by the token in its run.json.
LOCAL = Key("local", "local commands", "", "", True, 0, None, None, None, 0, 0, 0)


class Authenticate:
    def __init__(self, app: ASGIApp, box: Box) -> None:
        self._app = app
        self._box = box

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].startswith("/v1"):
            try:
                scope["state"]["key"] = await self._find(Headers(scope=scope))
            except ApiError as error:
                await envelope.response(error, scope["path"])(scope, receive, send)
                return
        await self._app(scope, receive, send)

    async def _find(self, headers: Headers) -> Key:
        secret = _secret(headers)
        if hmac.compare_digest(secret.encode(), self._box.control_token.encode()):
            return LOCAL
        if not keys.well_formed(secret):
            raise Unauthorized(
                "The API key is malformed (mistyped or cut off): it is sk-pnv- and "
                "44 letters and digits, with nothing before or after."
            )
        key = await keys.find(self._box.database, secret)
        if key is None:
            raise Unauthorized("The API key is unknown to this box: create one with 'keys create'.")
        if key.revoked_at is not None:
            raise Unauthorized(f"The API key {key.prefix}... has been revoked.")
        if key.expired(time.time_ns() // 1_000_000):
            raise Unauthorized(f"The API key {key.prefix}... has expired.")
        return key


def _secret(headers: Headers) -> str:
    value = headers.get("authorization")
    if not value:
        # Anthropic's clients send it so.
        if secret := headers.get("x-api-key"):
            return secret
        raise Unauthorized(
            "There is no API key: send it as the header 'Authorization: Bearer sk-pnv-...'."
        )
    scheme, _, secret = value.partition(" ")
    if scheme.lower() != "bearer" or not secret:
        raise Unauthorized(
            "The Authorization header is malformed: write it as 'Bearer sk-pnv-...'."
        )
    return secret


def key_of(request: Request) -> Key:
    key: Key = request.scope["state"]["key"]
    return key


def require_account(request: Request) -> None:
    """What is served is written to a key's account; the token in run.json has none."""
    if key_of(request) is LOCAL:
        raise Forbidden("The token in run.json is for commands: ask the model with an API key.")


def require_admin(request: Request) -> None:
    if not key_of(request).admin:
        raise Forbidden("This key may not do that: it needs an admin key ('keys create --admin').")
