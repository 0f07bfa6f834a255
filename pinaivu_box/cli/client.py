"""The API of the running server, as commands call it: `run.json` in the home says where it is."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import msgspec

from pinaivu_box.cli.home import load_config
from pinaivu_box.errors import CliError, NotRunning

_CONNECT_SECONDS = 10.0
# A join may try several addresses.
_JOIN_SECONDS = 40.0


class Running(msgspec.Struct, frozen=True):
    """`run.json` in the home (0600): the process, the address and an admin token of the server."""

    pid: int
    url: str
    token: str


def write_running(home: Path, running: Running) -> None:
    path = home / "run.json"
    path.unlink(missing_ok=True)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "wb") as file:
        file.write(msgspec.json.encode(running))


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

    try:
        running = _running(home)
        answer = httpx.request(
            method,
            running.url + path,
            headers=_headers(running.token),
            json=body,
            timeout=seconds,
            trust_env=False,  # the server is on this machine: no proxy
        )
    except (OSError, msgspec.DecodeError, httpx.HTTPError) as error:
        raise _not_running(home) from error
    return _content(answer)


def stream(home: Path, path: str, body: Any, seconds: float) -> Iterator[Any]:
    """The lines of an answer to a POST; `seconds` may pass between two of them.

    Raises NotRunning, CliError if the server refuses or stops.
    """
    import httpx

    try:
        running = _running(home)
        with httpx.stream(
            "POST",
            running.url + path,
            headers=_headers(running.token),
            json=body,
            timeout=httpx.Timeout(_CONNECT_SECONDS, read=seconds),
            trust_env=False,
        ) as answer:
            if answer.is_error:
                answer.read()
                _content(answer)
            yield from map(msgspec.json.decode, answer.iter_lines())
    except (httpx.ReadError, httpx.ReadTimeout, httpx.RemoteProtocolError) as error:
        raise CliError("The box stopped or does not answer: run 'pinaivu doctor'.") from error
    except (OSError, msgspec.DecodeError, httpx.HTTPError) as error:
        raise _not_running(home) from error


def request_or_open(
    home: Path,
    config: Path | None,
    path: str,
    *,
    method: str,
    body: Any,
    needs_peering: str = "",
) -> Any:
    """As `request`; if no server runs, the box is opened for this request, with peering on.

    `needs_peering` is the error if the configuration has peering off.  Raises CliError.
    """
    try:
        return request(home, path, method=method, body=body, seconds=_JOIN_SECONDS)
    except NotRunning:
        if needs_peering and not load_config(home, config).peering.enabled:
            raise CliError(needs_peering) from None
        return asyncio.run(_request_opened(home, config, path, method, body))


async def _request_opened(
    home: Path, config: Path | None, path: str, method: str, body: Any
) -> Any:
    import httpx

    from pinaivu_box.box import open_box
    from pinaivu_box.server.app import create_app

    def load() -> Any:
        return load_config(home, config, overrides={("peering", "enabled"): True})

    async with open_box(load, home) as box:
        transport = httpx.ASGITransport(create_app(box))
        async with httpx.AsyncClient(transport=transport, base_url="http://box") as client:
            answer = await client.request(
                method,
                path,
                headers=_headers(box.control_token),
                json=body,
                timeout=_JOIN_SECONDS,
            )
    return _content(answer)


def _running(home: Path) -> Running:
    return msgspec.json.decode((home / "run.json").read_bytes(), type=Running)


def _headers(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def _not_running(home: Path) -> NotRunning:
    return NotRunning(f"No box is running on {home}: start one with 'pinaivu serve'.")


def _content(answer: Any) -> Any:
    """Raises CliError."""
    if answer.is_error:
        raise CliError(answer.json()["error"]["message"])
    return answer.json()
