"""The sections `[peering]` and `[witness]` of the configuration: other boxes, and others' logs."""

from __future__ import annotations

import ipaddress
import re
from typing import Annotated, Literal
from urllib.parse import urlsplit

from msgspec import Meta

from pinaivu_box import amount
from pinaivu_box.config_section import BASE_URL, Port, PositiveInt, Section, Weight
from pinaivu_box.text import NO_CONTROLS

RoutingPolicy = Literal["prefer-local", "never", "balance", "cheapest"]
BEYOND = ("idle", "refuse")
HOURS = re.compile("([01][0-9]|2[0-3]):[0-5][0-9]-([01][0-9]|2[0-3]):[0-5][0-9]")
_URL = re.compile(r"https?://[!-~]{1,90}")
_KEY = re.compile(r"[^\s+]{1,256}\+[0-9a-f]{8}\+[A-Za-z0-9+/]{44}")  # of a log, or a witness
_LOG = re.compile(f"node_[0-9a-f]{{64}}|{_KEY.pattern}")
_HOST_PORT = re.compile(
    r"(?:\[(?P<v6>[0-9A-Fa-f:.]{2,45})\]|[A-Za-z0-9](?:[A-Za-z0-9.-]{0,88}[A-Za-z0-9])?)"
    r":(?P<port>[0-9]{1,5})"
)
_MIN_COPY_MB_PER_S = 0.1  # at less, a piece takes longer than a peer waits for it


class PeeringServeConfig(Section, frozen=True):
    """The limits of peers; `pinaivu peers edit` sets others for one of them."""

    max_parallel: PositiveInt = 8
    tokens_per_minute: Annotated[int, Meta(ge=0)] = 0
    credit_limit: str = ""
    beyond: str = "idle"
    models: tuple[str, ...] = ("*",)
    hours: str = ""
    copy_mb_per_s: Annotated[float, Meta(ge=0)] = 0.0


class PeeringConfig(Section, frozen=True):
    enabled: bool = False
    host: str = "0.0.0.0"  # noqa: S104 - peers are on other machines, and authenticate
    port: Port = 4002
    relay: str = "none"
    name: Annotated[str, Meta(max_length=64, pattern=NO_CONTROLS)] = ""
    announce: bool = False
    advertise: Annotated[tuple[str, ...], Meta(max_length=4)] = ()
    policy: RoutingPolicy = "prefer-local"
    same_name: bool = False
    share_models: bool = True
    price_weight: Weight = 0.4
    time_weight: Weight = 0.3
    reputation_weight: Weight = 0.3
    hedge_ms: Annotated[int, Meta(ge=0)] = 0
    max_price: str = ""
    max_debt: str = ""
    serve: PeeringServeConfig = PeeringServeConfig()


class WitnessConfig(Section, frozen=True):
    """Beside the members of the network: `logs` that this box witnesses, each a node id or the key
    of a log as other programs write it (NAME+ID+BASE64), and `urls` of witnesses for its own log:
    boxes, and with a key before them other programs.
    """

    logs: Annotated[tuple[str, ...], Meta(max_length=256)] = ()
    urls: Annotated[tuple[str, ...], Meta(max_length=32)] = ()


def check_peering(peering: PeeringConfig) -> None:
    try:
        ipaddress.ip_address(peering.host)
    except ValueError:
        raise ValueError(f"peering.host is '{peering.host}', not an IP address") from None
    if peering.relay not in ("none", "n0") and not _is_url(peering.relay):
        raise ValueError(
            f"peering.relay is '{peering.relay}', not none, n0 or the URL of a relay, such as "
            "https://HOST or https://HOST:PORT"
        )
    for address in peering.advertise:
        if not is_host_port(address):
            raise ValueError(
                f"peering.advertise has '{address}', which is not HOST:PORT or [IPv6]:PORT"
            )
    if peering.serve.hours and not HOURS.fullmatch(peering.serve.hours):
        raise ValueError(f"peering.serve.hours is '{peering.serve.hours}', not as in 18:00-08:00")
    if 0 < peering.serve.copy_mb_per_s < _MIN_COPY_MB_PER_S:
        raise ValueError(
            f"peering.serve.copy_mb_per_s is {peering.serve.copy_mb_per_s:g}: it must be at least "
            f"{_MIN_COPY_MB_PER_S:g}, or 0 for no limit"
        )
    if not peering.price_weight + peering.time_weight + peering.reputation_weight > 0:
        raise ValueError(
            "peering.price_weight, time_weight and reputation_weight must not all be 0"
        )
    amount.check("peering.serve.credit_limit", peering.serve.credit_limit or "0", amount.parse)
    amount.check("peering.max_debt", peering.max_debt or "0", amount.parse)
    amount.check("peering.max_price", peering.max_price or "0", amount.per_token)


def check_witness(witness: WitnessConfig) -> None:
    for text in witness.logs:
        if not _LOG.fullmatch(text):
            raise ValueError(
                f"witness.logs has '{text[:80]}', which is neither a node id ('pinaivu id') nor a "
                "log's key as in NAME+ID+BASE64"
            )
    for text in witness.urls:
        key, _, url = text.rpartition(" ")
        if (
            not BASE_URL.fullmatch(url)
            or not urlsplit(url).hostname
            or not (url == text or _KEY.fullmatch(key))
        ):
            raise ValueError(
                f"witness.urls has '{text[:80]}', which is no URL such as "
                "https://HOST:4001/v1/witness, and none after a witness's key as in NAME+ID+BASE64"
            )


def is_host_port(text: str) -> bool:
    """Whether the text is HOST:PORT or [IPv6]:PORT."""
    match = _HOST_PORT.fullmatch(text)
    if match is None or not 0 < int(match["port"]) < 65536:
        return False
    try:
        return match["v6"] is None or ipaddress.ip_address(match["v6"]).version == 6
    except ValueError:
        return False


def _is_url(text: str) -> bool:
    """Whether the text is an HTTP URL, short enough to be an address of a box."""
    try:
        parts = urlsplit(text)
        named = bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False
    return named and _URL.fullmatch(text) is not None
