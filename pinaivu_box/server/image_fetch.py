"""Images that a request names by URL, fetched from hosts that the operator allows.

Whoever may name a URL makes this box ask for it, also within its own network.  So without a list of
hosts nothing is fetched; a listed name may not lead to a private address unless that is listed too;
the address that was checked is the one that is asked, so a name that leads elsewhere a moment later
does not matter; and a redirect stays on its host.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from urllib.parse import SplitResult, urljoin, urlsplit

import httpx

import pinaivu_box
from pinaivu_box.errors import BodyTooLarge, InvalidBody, UnsupportedParameter, quoted
from pinaivu_box.server_config import is_network

_SECONDS = 20.0  # for all of one image
_MAX_REDIRECTS = 3
_REDIRECTS = (301, 302, 303, 307, 308)
_PORTS = {"http": 80, "https": 443}

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class _Failed(Exception):
    """Why an image cannot be had, as the end of a sentence."""


async def fetch(
    url: str, at: tuple[str | int, ...], hosts: tuple[str, ...], max_bytes: int
) -> bytes:
    """The file at that URL, which is at the path `at` of the body; of at most `max_bytes`.

    Raises UnsupportedParameter if `hosts` do not allow it, InvalidBody if it cannot be had,
    BodyTooLarge.
    """
    try:
        async with asyncio.timeout(_SECONDS):
            return await _fetch(url, at, hosts, max_bytes)
    except TimeoutError:
        why = f"it did not come within {_SECONDS:g} s"
    except (_Failed, httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:
        why = str(error) if isinstance(error, _Failed) else "its server cannot be reached"
    raise InvalidBody(
        f"the image {quoted(url)} cannot be had: {why}; send it in a data: URL", loc=("body", *at)
    )


async def _fetch(
    url: str, at: tuple[str | int, ...], hosts: tuple[str, ...], max_bytes: int
) -> bytes:
    first = _parts(url)
    _check_allowed(first, at, hosts)
    async with httpx.AsyncClient(trust_env=False, timeout=_SECONDS) as client:
        for _ in range(_MAX_REDIRECTS + 1):
            parts = _parts(url)
            if parts[:2] != first[:2]:
                raise _Failed("its server sends us to another host")
            request = _request(client, parts, await _address(parts, hosts))
            response = await client.send(request, stream=True)
            try:
                if response.status_code in _REDIRECTS:
                    url = urljoin(url, response.headers.get("location", ""))
                    continue
                if response.status_code != httpx.codes.OK:
                    raise _Failed(f"its server answers {response.status_code}")
                return await _body(response, max_bytes)
            finally:
                await response.aclose()
    raise _Failed("its server sends us from one place to another")


def _parts(url: str) -> SplitResult:
    """Raises _Failed."""
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        raise _Failed("it is no URL") from None
    if parts.scheme not in _PORTS or not parts.hostname or parts.username is not None:
        raise _Failed("it is no http: or https: URL of a host, without a password")
    return parts


def _check_allowed(parts: SplitResult, at: tuple[str | int, ...], hosts: tuple[str, ...]) -> None:
    """Raises UnsupportedParameter."""
    host = parts.hostname or ""
    if host in hosts or _listed(host, hosts):
        return
    raise UnsupportedParameter(
        f"this box fetches no images from {quoted(host)} ([server] image_hosts): send the image in "
        "a data: URL",
        loc=("body", *at),
        kind="value_error.unsupported",
    )


def _listed(address: str | Address, hosts: tuple[str, ...]) -> bool:
    """Whether it is an address that is listed, or in a network that is."""
    try:
        known = ipaddress.ip_address(address)
    except ValueError:
        return False
    return any(known in ipaddress.ip_network(host) for host in hosts if is_network(host))


async def _address(parts: SplitResult, hosts: tuple[str, ...]) -> str:
    """The address to ask.  Raises _Failed, OSError."""
    port = parts.port or _PORTS[parts.scheme]
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM)
    addresses = [ipaddress.ip_address(str(at[0]).partition("%")[0]) for *_, at in found]
    for address in addresses:
        if not (address.is_global and not address.is_multicast) and not _listed(address, hosts):
            raise _Failed(
                "its host has a private address, which [server] image_hosts does not list"
            )
    return str(addresses[0])


def _request(client: httpx.AsyncClient, parts: SplitResult, address: str) -> httpx.Request:
    """Asks that address for what the URL names; the certificate has to be that of its host."""
    host = f"[{address}]" if ":" in address else address
    netloc = host if parts.port is None else f"{host}:{parts.port}"
    return client.build_request(
        "GET",
        parts._replace(netloc=netloc, fragment="").geturl(),
        headers={
            "Host": parts.netloc,
            "User-Agent": f"pinaivu-box/{pinaivu_box.__version__}",
            "Accept": "image/*",
            "Accept-Encoding": "identity",
        },
        extensions={"sni_hostname": parts.hostname},
    )


async def _body(response: httpx.Response, max_bytes: int) -> bytes:
    """Raises BodyTooLarge."""
    data = bytearray()
    async for part in response.aiter_raw():
        data += part
        if len(data) > max_bytes:
            raise BodyTooLarge(f"An image is larger than {max_bytes} bytes: send a smaller one.")
    return bytes(data)
