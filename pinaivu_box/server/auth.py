"""Who asks?  Pure ASGI: `/v1` needs a key, which ends up in `scope["state"]["key"]`."""

from __future__ import annotations

import hmac
import time

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Send
from starlette.types import Scope as AsgiScope

from pinaivu_box.box import Box
from pinaivu_box.errors import ApiError, Forbidden, Unauthorized
from pinaivu_box.gateway.admission import refusal
from pinaivu_box.policy import Policy, Scope
from pinaivu_box.server import envelope
from pinaivu_box.store import keys
from pinaivu_box.store.keys import Key

# The commands on this home, by the token in its run.json.
LOCAL = Key("local", "", "", "local commands", "", "", Policy(scopes=("admin",)), 0)
# The scope that a path needs, by its beginning; a key may see the list of models without any.
_SCOPES: tuple[tuple[str, Scope], ...] = (
    ("/v1/admin", "admin"),
    ("/v1/engines", "admin"),
    ("/v1/usage", "usage"),
    ("/v1/receipts", "receipts"),
)
_FREE = ("/v1/models",)


class Authenticate:
    def __init__(self, app: ASGIApp, box: Box) -> None:
        self._app = app
        self._box = box

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].startswith("/v1"):
            try:
                key = await self._find(Headers(scope=scope))
                _check(key, scope)
            except ApiError as error:
                self._box.refusals.note("", "", error.code)
                path = scope["path"]
                shown = envelope.told(error, self._box.config.server.contact, path)
                await envelope.response(shown, path)(scope, receive, send)
                return
            scope["state"]["key"] = key
            if key.policy.rpm is not None or key.policy.tpm is not None:
                send = self._with_limits(key, send)
        await self._app(scope, receive, send)

    def _with_limits(self, key: Key, send: Send) -> Send:
        async def send_with_limits(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(await self._box.admission.headers(key))
            await send(message)

        return send_with_limits

    async def _find(self, headers: Headers) -> Key:
        secret = _secret(headers)
        if hmac.compare_digest(secret.encode(), self._box.control_token.encode()):
            return LOCAL
        if not keys.well_formed(secret):
            raise Unauthorized(
                "The API key is malformed (mistyped or cut off): it is sk-pnv- and "
                "44 letters and digits, with nothing before or after."
            )
        found = await keys.find(self._box.database, secret)
        if found is None:
            raise Unauthorized("The API key is unknown to this box: create one with 'keys create'.")
        key, old = found
        if (error := refusal(key)) is not None:
            raise error
        now = time.time_ns() // 1_000_000
        if old and (key.old_until or 0) <= now:
            raise Unauthorized(f"The API key has been rotated: use {key.prefix}...{key.last_four}.")
        return key


def _check(key: Key, scope: AsgiScope) -> None:
    """Raises Forbidden."""
    address = scope["client"][0] if scope.get("client") else ""
    if not key.policy.admits(address):
        raise Forbidden(f"The API key {key.prefix}... may not be used from {address}.")
    path = scope["path"]
    if path.startswith(_FREE) or key is LOCAL:
        return
    needed = next((name for start, name in _SCOPES if path.startswith(start)), "inference")
    reads = needed in ("usage", "receipts") and key.admin
    if needed not in key.policy.scopes and not reads:
        raise Forbidden(
            f"This needs a key with the scope '{needed}', and {key.prefix}... has only "
            f"{', '.join(key.policy.scopes) or 'none'}."
        )


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
    """What is served is written to a key's account; the token in run.json has none."""
    if key_of(request) is LOCAL:
        raise Forbidden("The token in run.json is for commands: ask the model with an API key.")
