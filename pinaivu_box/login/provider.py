"""A provider of OpenID Connect: where it is, its keys, and what it says of who logs in there."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from base64 import urlsafe_b64encode
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlencode

import httpx
import msgspec

from pinaivu_box.errors import SignOnFailed, quoted
from pinaivu_box.login import id_token
from pinaivu_box.login.provider_http import ProviderHttp
from pinaivu_box.login_config import OidcConfig
from pinaivu_box.secret import Secret

if TYPE_CHECKING:
    from joserfc.jwk import KeySet

    from pinaivu_box.login.oidc import Attempt

log = logging.getLogger("pinaivu.login")

_KEPT_SECONDS = 3600.0  # what the provider publishes
_LEAST_SECONDS = 60.0  # between two looks for a key that is not known
_MAX_AT_ONCE = 32  # logins
_WELL_KNOWN = "/.well-known/openid-configuration"


class Endpoints(msgspec.Struct, frozen=True):
    """What is used of a provider's description (OpenID Connect Discovery)."""

    issuer: str
    authorization_endpoint: str
    token_endpoint: str
    jwks_uri: str
    userinfo_endpoint: str = ""
    token_endpoint_auth_methods_supported: tuple[str, ...] = ("client_secret_basic",)


class Provider:
    def __init__(
        self,
        config: OidcConfig,
        secret: Secret | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.config, self.secret = config, secret
        self._clock = clock
        self._http = ProviderHttp(config.name, config.issuer)
        self._lock = asyncio.Lock()  # one request for what the provider publishes at a time
        self._endpoints: tuple[float, Endpoints] | None = None  # with the time it was had
        self._keys: tuple[float, KeySet] | None = None
        self._running = 0  # logins that ask it now

    async def login_url(self, attempt: Attempt) -> str:
        """Where the browser logs in, and is sent back from.  Raises SignOnUnavailable."""
        endpoint = (await self.endpoints()).authorization_endpoint
        challenge = urlsafe_b64encode(hashlib.sha256(attempt.verifier.encode()).digest()).rstrip(
            b"="
        )
        parameters = {
            "response_type": "code",
            "client_id": self.config.client_id,
            "redirect_uri": attempt.redirect_uri,
            "scope": " ".join(self.config.scopes),
            "state": attempt.state,
            "nonce": attempt.nonce,
            "code_challenge": challenge.decode(),
            "code_challenge_method": "S256",
        }
        return f"{endpoint}{'&' if '?' in endpoint else '?'}{urlencode(parameters)}"

    async def claims(self, attempt: Attempt, code: str) -> dict[str, Any]:
        """What the provider says of who logged in, and came back with that code.  Raises
        SignOnFailed."""
        if self._running >= _MAX_AT_ONCE:
            raise self._http.unusable("many people are logging in")
        self._running += 1
        try:
            return await self._claims(attempt, code)
        finally:
            self._running -= 1

    async def _claims(self, attempt: Attempt, code: str) -> dict[str, Any]:
        endpoints = await self.endpoints()
        token, access_token = await self._tokens(endpoints, attempt, code)
        claims = await self._checked(endpoints, token, attempt.nonce, access_token)
        if endpoints.userinfo_endpoint and access_token:
            more = await self._http.document(
                endpoints.userinfo_endpoint,
                "userinfo",
                headers={"Authorization": f"Bearer {access_token}"},
            )
            if more.get("sub") != claims["sub"]:
                raise SignOnFailed("The provider's answers are about two people: try again.")
            claims = {**more, **claims}
        return claims

    async def endpoints(self) -> Endpoints:
        """Raises SignOnUnavailable."""
        async with self._lock:
            if self._endpoints and self._clock() - self._endpoints[0] < _KEPT_SECONDS:
                return self._endpoints[1]
            url = self.config.issuer.rstrip("/") + _WELL_KNOWN
            found = await self._http.document(url, "description")
            try:
                endpoints = msgspec.convert(found, Endpoints)
            except msgspec.ValidationError as error:
                raise self._http.unusable("its description lacks something") from error
            if endpoints.issuer != self.config.issuer:
                raise self._http.unusable(
                    f"it calls itself '{quoted(endpoints.issuer)}', and login.oidc.issuer is "
                    f"'{self.config.issuer}'"
                )
            self._http.check_url(endpoints.authorization_endpoint, "authorization endpoint")
            self._endpoints = (self._clock(), endpoints)
            return endpoints

    async def _tokens(self, endpoints: Endpoints, attempt: Attempt, code: str) -> tuple[str, str]:
        """The ID token and the access token for a code.  Raises SignOnFailed."""
        client_id, body = self.config.client_id, {
            "grant_type": "authorization_code",
            "code": code,
            "redirect_uri": attempt.redirect_uri,
            "code_verifier": attempt.verifier,
        }  # fmt: skip
        more: dict[str, Any] = {"data": body}
        methods = endpoints.token_endpoint_auth_methods_supported
        if self.secret is None:
            body["client_id"] = client_id
        elif "client_secret_basic" not in methods and "client_secret_post" in methods:
            body |= {"client_id": client_id, "client_secret": self.secret.reveal()}
        else:  # RFC 6749, section 2.3.1: both are encoded first
            pair = (quote(client_id, safe=""), quote(self.secret.reveal(), safe=""))
            more["auth"] = httpx.BasicAuth(*pair)
        url = endpoints.token_endpoint
        status, found = await self._http.request("POST", url, "token endpoint", **more)
        token, access_token = found.get("id_token"), found.get("access_token", "")
        if status != 200 or not isinstance(token, str) or not isinstance(access_token, str):
            why = quoted(str(found.get("error", "no ID token")))
            fields = {"status": status, "error": why}
            log.warning("the provider gave no token", extra={"fields": fields})
            if why == "invalid_client":
                raise self._http.unusable("it refuses the client_id of this box, or its secret")
            raise SignOnFailed(f"The provider refused this login ({status}): try again.")
        return token, access_token

    async def _checked(
        self, endpoints: Endpoints, token: str, nonce: str, access_token: str
    ) -> dict[str, Any]:
        expected = {
            "issuer": self.config.issuer,
            "client_id": self.config.client_id,
            "nonce": nonce,
            "access_token": access_token,
        }

        async def checked(max_age: float) -> dict[str, Any]:
            keys = await self._key_set(endpoints, max_age)
            # In a thread: the libraries are loaded by the first token, in a quarter of a second.
            return await asyncio.to_thread(partial(id_token.checked, token, keys, **expected))

        try:
            return await checked(_KEPT_SECONDS)
        except id_token.UnknownKey:  # it may have been made since
            return await checked(_LEAST_SECONDS)

    async def _key_set(self, endpoints: Endpoints, max_age: float) -> KeySet:
        """The keys as they were at most so many seconds ago.  Raises SignOnUnavailable."""
        async with self._lock:
            if self._keys is None or self._clock() - self._keys[0] >= max_age:
                document = await self._http.document(endpoints.jwks_uri, "keys")
                keys = await asyncio.to_thread(id_token.key_set, document)
                self._keys = (self._clock(), keys)
            return self._keys[1]
