"""HTTP requests to registries: documents of bounded size, and ranges of files.

A registry may answer with a redirect to the storage that has the file, whose URL is signed and
expires; and with the demand for a token (the OCI distribution specification's `WWW-Authenticate:
Bearer`), which is had from the server that it names.  Credentials are sent to the host that they
are for, never on to where it redirects.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx
import msgspec

import pinaivu_box
from pinaivu_box import backoff, http_body
from pinaivu_box.errors import PullFailed, quoted
from pinaivu_box.registry.reference import host_of, is_loopback

T = TypeVar("T")

MAX_DOCUMENT_BYTES = 4 * 1024 * 1024
_MAX_ERROR_BYTES = 65_536
_MAX_REDIRECTS = 5
_CONNECT_SECONDS = 15.0
_STALL_SECONDS = 30.0  # without a byte
_ATTEMPTS = 4  # of a document
_FIRST_RETRY_SECONDS, _MAX_RETRY_SECONDS = 0.5, 8.0
_RETRIED = {408, 429, 500, 502, 503, 504}
_CHALLENGE = re.compile(r'([A-Za-z_]+)="([^"]*)"')
_TOKEN_FILE = Path("~/.cache/huggingface/token")  # where the Hub's own tools keep it


class _TokenAnswer(msgspec.Struct):
    token: str = ""
    access_token: str = ""


class HttpStatus(PullFailed):
    """A registry answered with a status that is not a success."""

    def __init__(self, status: int, url: str, detail: str = "") -> None:
        self.status = status
        self.host = host_of(url)
        phrase = httpx.codes.get_reason_phrase(status)
        said = f": {quoted(detail)}" if detail else ""
        super().__init__(f"{self.host} answered {status} {phrase}".rstrip() + f"{said}.")


def hub_token() -> str:
    """The user's token for the Hub; empty if there is none."""
    if token := os.environ.get("HF_TOKEN", "").strip():
        return token
    try:
        return Path(os.environ.get("HF_TOKEN_PATH", _TOKEN_FILE)).expanduser().read_text().strip()
    except (OSError, RuntimeError, UnicodeDecodeError):
        return ""


class RegistryClient:
    """Requests to the registry at the base URL `base`, with a token for it.  Use it as an async
    context manager, which closes its connections."""

    def __init__(self, base: str, token: str = "", random: Random | None = None) -> None:
        self._host, self._token = host_of(base), token
        self._plain = base.startswith("http://")
        self._random = random or Random()  # noqa: S311, it spreads retries
        self._http = httpx.AsyncClient(
            follow_redirects=True,
            max_redirects=_MAX_REDIRECTS,
            timeout=httpx.Timeout(_STALL_SECONDS, connect=_CONNECT_SECONDS),
            headers={"User-Agent": f"pinaivu-box/{pinaivu_box.__version__}"},
            event_hooks={"request": [self._check_protected]},
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=16),
        )

    async def __aenter__(self) -> RegistryClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        await self._http.aclose()

    async def document(self, url: str, kind: type[T], *, accept: str = "application/json") -> T:
        """Return a JSON document.  Raises PullFailed (HttpStatus)."""
        data = await self.download(url, accept=accept)
        try:
            return msgspec.json.decode(data, type=kind)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise PullFailed(
                f"{host_of(url)} answered with something that is no model's description: {error}."
            ) from error

    async def download(
        self, url: str, *, accept: str = "*/*", max_bytes: int = MAX_DOCUMENT_BYTES
    ) -> bytes:
        """Return a whole document of at most `max_bytes`.  Raises PullFailed (HttpStatus)."""
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                return await self._download(url, accept, max_bytes)
            except HttpStatus as error:
                if error.status not in _RETRIED or attempt == _ATTEMPTS:
                    raise
            except httpx.TransportError as error:
                if attempt == _ATTEMPTS:
                    raise unreachable(url, error) from error
            delay = backoff.delay(attempt, _FIRST_RETRY_SECONDS, _MAX_RETRY_SECONDS, self._random)
            await asyncio.sleep(delay)
        raise AssertionError("the last attempt returns or raises")

    async def _download(self, url: str, accept: str, max_bytes: int) -> bytes:
        async with self.open(url, {"Accept": accept}) as response:
            data = await http_body.read(response, max_bytes)
        if data is None:
            raise PullFailed(f"What {host_of(url)} sent is too long to be a description.")
        return data

    @asynccontextmanager
    async def open(self, url: str, headers: Mapping[str, str]) -> AsyncIterator[httpx.Response]:
        """Request a URL, with a token if the registry demands one; the body is still to be read.
        Raises PullFailed (HttpStatus), httpx.TransportError."""
        response = await self._send(url, headers)
        try:
            if response.status_code == 401 and await self._authenticate(response):
                await response.aclose()
                response = await self._send(url, headers)
            if not response.is_success:
                raise HttpStatus(response.status_code, url, await _detail(response))
            yield response
        finally:
            await response.aclose()

    async def _check_protected(self, request: httpx.Request) -> None:
        """Refuse plain HTTP, also after a redirect, unless the registry itself speaks it or it is
        this machine.  Raises PullFailed."""
        host = host_of(str(request.url))
        if request.url.scheme != "https" and not self._plain and not is_loopback(host):
            raise PullFailed(f"{host} sends without TLS what {self._host} leads to: not used.")

    async def _send(self, url: str, headers: Mapping[str, str]) -> httpx.Response:
        if self._token and host_of(url) == self._host:
            headers = {**headers, "Authorization": f"Bearer {self._token}"}
        request = self._http.build_request("GET", url, headers=headers)
        try:
            return await self._http.send(request, stream=True)
        except (httpx.TooManyRedirects, httpx.UnsupportedProtocol, httpx.InvalidURL) as error:
            raise PullFailed(f"{host_of(url)} redirects to nowhere: {error}.") from error

    async def _authenticate(self, response: httpx.Response) -> bool:
        """Get the token that a registry demands, if it names an HTTPS server (or is on this
        machine) and has not refused one before."""
        scheme, _, parameters = response.headers.get("WWW-Authenticate", "").partition(" ")
        challenge = dict(_CHALLENGE.findall(parameters))
        realm = challenge.pop("realm", "")
        if self._token or scheme.lower() != "bearer" or not _is_safe(realm, response.url):
            return False
        query = {name: challenge[name] for name in ("service", "scope") if name in challenge}
        answer = await self._http.get(realm, params=query)
        if not answer.is_success:
            return False
        try:
            token = msgspec.json.decode(answer.content, type=_TokenAnswer)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return False
        self._token = token.token or token.access_token
        return bool(self._token)


def unreachable(url: str, error: Exception) -> PullFailed:
    """The error for a registry that cannot be reached."""
    reason = str(error) or type(error).__name__
    return PullFailed(
        f"{host_of(url)} cannot be reached ({quoted(reason)}): check the network, and HTTPS_PROXY "
        "if there is a proxy."
    )


def _is_safe(realm: str, origin: httpx.URL) -> bool:
    parts = urlsplit(realm)
    return bool(parts.netloc) and (parts.scheme == "https" or parts.scheme == origin.scheme)


async def _detail(response: httpx.Response) -> str:
    """What an answer says about its failure: the first error of an OCI registry, or the Hub's."""
    try:
        body: Any = msgspec.json.decode(await http_body.read(response, _MAX_ERROR_BYTES) or b"")
    except (httpx.TransportError, msgspec.DecodeError, UnicodeDecodeError):
        return ""
    if not isinstance(body, dict):
        return ""
    errors = body.get("errors")
    if isinstance(errors, list) and errors and isinstance(errors[0], dict):
        return str(errors[0].get("message") or errors[0].get("code") or "")
    return str(body.get("error") or "")
