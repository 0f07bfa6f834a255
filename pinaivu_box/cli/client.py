"""The API of the running server, as commands call it: `run.json` in the home says where it is."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

import msgspec

from pinaivu_box.cli.call import Call
from pinaivu_box.errors import CliError, NotRunning
from pinaivu_box.tls.pinned import context_for, pinned_context

if TYPE_CHECKING:
    import ssl

    import httpx

_CONNECT_SECONDS = 10.0
# A join may try several addresses.
_JOIN_SECONDS = 40.0


class Running(msgspec.Struct, frozen=True):
    """`run.json` in the home (0600): the process, the address and an admin token of the server."""

    pid: int
    url: str
    token: str


class _AnswerObject(dict[str, Any]):
    """An object in an answer of the server, which may be one of an earlier version: until it is
    restarted after an update.  Raises CliError for what it does not have."""

    def __missing__(self, name: str) -> Any:
        raise CliError(
            f"The answer of the running box has no '{name}': it is of another version than this "
            "command.  Restart it, and try again."
        )


def write_running(home: Path, running: Running) -> None:
    path = home / "run.json"
    path.unlink(missing_ok=True)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "wb") as file:
        file.write(msgspec.json.encode(running))


def running_on(home: Path) -> Running | None:
    """What `run.json` says of the server that runs on this home, or did when it was killed."""
    try:
        return msgspec.json.decode((home / "run.json").read_bytes(), type=Running)
    except (OSError, msgspec.DecodeError):
        return None


def answers(home: Path, url: str) -> bool:
    """Whether the server of that home answers there."""
    import httpx

    try:
        verify = context_for(home, url)
        answer = httpx.get(
            f"{url}/health", timeout=_CONNECT_SECONDS, trust_env=False, verify=verify
        )
    except (httpx.HTTPError, NotRunning):
        return False
    return answer.is_success


def own_server_context(home: Path, url: str) -> ssl.SSLContext | None:
    """What verifies the server of this home, if the URL leads to it on this machine over TLS."""
    running = running_on(home)
    try:
        parts, own = urlsplit(url), urlsplit(running.url if running else "")
        here = parts.hostname in (own.hostname, "localhost", "127.0.0.1", "::1")
        if not here or (parts.scheme, parts.port) != ("https", own.port):
            return None
        return pinned_context(home)
    except (ValueError, NotRunning):
        return None


def path_of(collection: str, name: str) -> str:
    """The path of one item of a collection."""
    return f"{collection}/{quote(name, safe='')}"


def request(
    home: Path, path: str, *, method: str = "GET", body: Any = None, seconds: float = 10
) -> Any:
    """The answer of the server that runs on this home.

    Raises NotRunning, CliError if the server refuses.
    """
    import httpx

    with _client(home, seconds) as client:
        try:
            return _content(client.request(method, path, json=body))
        except httpx.ReadTimeout as error:
            raise CliError(
                f"The box has not answered for {seconds:g} s: what was asked may still be done."
            ) from error


def stream(home: Path, path: str, body: Any, seconds: float) -> Iterator[Any]:
    """The lines of an answer to a POST; `seconds` may pass between two of them.

    Raises NotRunning, CliError if the server refuses or stops.
    """
    import httpx

    with _client(home, seconds) as client:
        try:
            with client.stream("POST", path, json=body) as answer:
                if answer.is_error:
                    answer.read()
                    _content(answer)
                yield from map(_decoded, answer.iter_lines())
        except (httpx.ReadError, httpx.ReadTimeout, httpx.RemoteProtocolError) as error:
            raise CliError("The box stopped or does not answer: run 'pinaivu doctor'.") from error


def request_or_open(
    call: Call,
    path: str,
    *,
    method: str,
    body: Any,
    peering: bool = True,
    needs_peering: str = "",
) -> Any:
    """As `request`; if no server runs, the box is opened for this request, with `peering` or
    without.

    `needs_peering` is the error if the configuration has peering off.  Raises CliError.
    """
    try:
        return request(call.home, path, method=method, body=body, seconds=_JOIN_SECONDS)
    except NotRunning:
        if needs_peering and not call.config().peering.enabled:
            raise CliError(needs_peering) from None
        return asyncio.run(_request_opened(call, path, method, body, peering))


async def _request_opened(call: Call, path: str, method: str, body: Any, peering: bool) -> Any:
    import httpx

    from pinaivu_box.box_services import open_box
    from pinaivu_box.server.app import create_app

    load = partial(call.config, overrides={("peering", "enabled"): peering})
    async with (
        open_box(load, call.home) as box,
        httpx.AsyncClient(
            transport=httpx.ASGITransport(create_app(box)),
            base_url="http://box",
            headers=_headers(box.control_token),
            timeout=_JOIN_SECONDS,
        ) as client,
    ):
        return _content(await client.request(method, path, json=body))


@contextmanager
def _client(home: Path, seconds: float) -> Iterator[httpx.Client]:
    """A client of the server that runs on this home, which waits so long for an answer.

    Raises NotRunning.
    """
    import httpx

    message = f"No box is running on {home}: start one with 'pinaivu serve'."
    running = running_on(home)
    if running is None:
        raise NotRunning(message)
    try:
        with httpx.Client(
            base_url=running.url,
            headers=_headers(running.token),
            timeout=httpx.Timeout(_CONNECT_SECONDS, read=seconds),
            trust_env=False,  # the server is on this machine: no proxy
            verify=context_for(home, running.url),
        ) as client:
            yield client
    except (OSError, json.JSONDecodeError, httpx.HTTPError) as error:
        raise NotRunning(message) from error


def _headers(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def _content(answer: httpx.Response) -> Any:
    """Raises CliError."""
    said = _decoded(answer.content)
    if answer.is_error:
        raise CliError(said["error"]["message"])
    return said


def _decoded(text: str | bytes) -> Any:
    return json.loads(text, object_hook=_AnswerObject)
