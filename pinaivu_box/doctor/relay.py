"""Does a relay of iroh's answer at a URL?  Asked as a box would, up to where it had to say who it
is."""

from __future__ import annotations

from collections.abc import Iterator

import httpx

from pinaivu_box.config import Config
from pinaivu_box.doctor.check import Check, State

SECONDS = 3.0
TODO = (
    "see that it runs, that its name is right and that TCP to it is let through, or choose another "
    "as [peering] relay; direct links do without it"
)
_UPGRADE = {
    "Connection": "Upgrade",
    "Upgrade": "websocket",
    "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA==",
    "Sec-WebSocket-Protocol": "iroh-relay-v2, iroh-relay-v1",
}


def why_not(url: str, seconds: float = SECONDS) -> str:
    """A clause; empty if it answers."""
    try:
        where = httpx.URL(url).join("/relay")
        with httpx.stream(
            "GET", where, headers=_UPGRADE, timeout=seconds, trust_env=False
        ) as answer:
            if answer.status_code == httpx.codes.SWITCHING_PROTOCOLS:
                return ""
    except httpx.TimeoutException:
        return f"{url} does not answer within {seconds:g} s"
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        return f"{url} does not answer ({str(error) or type(error).__name__})"
    return f"what answers at {url} is no relay (status {answer.status_code})"


def own(url: str, bad: State = "failed") -> Check:
    """The one that this box uses."""
    if why := why_not(url):
        return Check("relay", bad, why, TODO)
    return Check("relay", "ok", f"{url} answers; boxes that find no direct way go by it")


def configured(config: Config) -> Iterator[Check]:
    """Of the public ones iroh chooses while it runs."""
    if config.peering.relay not in ("none", "n0"):
        yield own(config.peering.relay)
