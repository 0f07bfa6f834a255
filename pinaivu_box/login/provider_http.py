"""HTTP to a provider of OpenID Connect: bounded, without redirects, and only where it is safe."""

from __future__ import annotations

import asyncio
import ssl
import time
from typing import Any
from urllib.parse import urlsplit

import httpx
import msgspec

import pinaivu_box
from pinaivu_box import http_body
from pinaivu_box.errors import SignOnUnavailable
from pinaivu_box.login_config import is_safe_url

_SECONDS = 10.0
_SILENT_SECONDS = 5.0  # how long it is not asked again after it did not answer
_MAX_BYTES = 1024 * 1024
_HEADERS = {
    "Accept": "application/json",
    "Accept-Encoding": "identity",
    "User-Agent": f"pinaivu-box/{pinaivu_box.__version__}",
}


class ProviderHttp:
    """`name` is what its users call the provider, `base` its issuer."""

    def __init__(self, name: str, base: str) -> None:
        self._name = name
        self._encrypted = base.startswith("https://")
        self._verify: ssl.SSLContext | None = None
        self._silent_until = 0.0

    def check_url(self, url: str, what: str) -> None:
        """Raises SignOnUnavailable for an address that the provider may not send us to."""
        if not is_safe_url(url) or (self._encrypted and urlsplit(url).scheme != "https"):
            raise self.unusable(f"its {what} is no https:// URL")

    def unusable(self, why: str) -> SignOnUnavailable:
        return SignOnUnavailable(
            f"{self._name} does not work now: {why}. Try again later; who has a password here can "
            "log in with it."
        )

    async def document(self, url: str, what: str, **more: Any) -> dict[str, Any]:
        """The JSON object there.  Raises SignOnUnavailable."""
        status, found = await self.request("GET", url, what, **more)
        if status != 200:
            raise self.unusable(f"its {what} answered {status}")
        return found

    async def request(
        self, method: str, url: str, what: str, **more: Any
    ) -> tuple[int, dict[str, Any]]:
        """The status, and the JSON object of the answer, {} for anything else.  Raises
        SignOnUnavailable."""
        self.check_url(url, what)
        if time.monotonic() < self._silent_until:
            raise self.unusable("it does not answer")
        try:
            async with (
                asyncio.timeout(_SECONDS),
                httpx.AsyncClient(
                    verify=await self._context(),
                    headers=_HEADERS,
                    timeout=_SECONDS,
                    trust_env=self._encrypted,  # a proxy of the operator's, but not to this machine
                ) as client,
                client.stream(method, url, **more) as answer,
            ):
                data = await http_body.read(answer, _MAX_BYTES)
        except (httpx.HTTPError, httpx.InvalidURL, OSError, TimeoutError) as error:
            # Who asks at the same time need not wait for that once more, one after the other.
            self._silent_until = time.monotonic() + _SILENT_SECONDS
            raise self.unusable("it does not answer") from error
        if data is None:
            raise self.unusable(f"its {what} is too long")
        if answer.status_code >= 500:
            raise self.unusable(f"its {what} answered {answer.status_code}")
        try:
            return answer.status_code, msgspec.json.decode(data, type=dict[str, Any])
        except (msgspec.DecodeError, UnicodeDecodeError):
            return answer.status_code, {}

    async def _context(self) -> ssl.SSLContext | bool:
        if not self._encrypted:
            return False  # plain HTTP on this machine: there is nothing to verify
        if self._verify is None:
            self._verify = await asyncio.to_thread(httpx.create_ssl_context)  # reads 200 kB
        return self._verify
