"""Checks whether a relay of iroh answers at a URL, as a box would connect to it."""

from __future__ import annotations

from collections.abc import Iterator

import httpx

from pinaivu_box.config import Config
from pinaivu_box.doctor.check import Check, State

_SECONDS = 3.0
TODO = (
    "check that it runs, that its name is correct and that TCP to it is allowed, or set another "
    "[peering] relay; direct links do not need one"
)
_UPGRADE = {
    "Connection": "Upgrade",
    "Upgrade": "websocket",
    "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA==",
    "Sec-WebSocket-Protocol": "iroh-relay-v2, iroh-relay-v1",
}


def why_not(url: str) -> str:
    """Why the relay cannot be used, as a clause; empty if it answers."""
    try:
        where = httpx.URL(url).join("/relay")
        with httpx.stream(
            "GET", where, headers=_UPGRADE, timeout=_SECONDS, trust_env=False
        ) as answer:
            if answer.status_code == httpx.codes.SWITCHING_PROTOCOLS:
                return ""
    except httpx.TimeoutException:
        return f"{url} does not answer within {_SECONDS:g} s"
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        return f"{url} does not answer ({str(error) or type(error).__name__})"
    return f"what answers at {url} is not a relay (status {answer.status_code})"


def own(url: str, bad: State = "failed") -> Check:
    """The check of the relay that this box uses."""
    if why := why_not(url):
        return Check("relay", bad, why, TODO)
    return Check("relay", "ok", f"{url} answers; boxes without a direct route use it")


def configured(config: Config) -> Iterator[Check]:
    """Check the configured relay; of the public ones iroh chooses at run time."""
    if config.peering.relay not in ("none", "n0"):
        yield own(config.peering.relay)
