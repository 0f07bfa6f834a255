"""Addresses of this box, as commands print them."""

from __future__ import annotations

import ipaddress

from pinaivu_box.server_config import ServerConfig

_ANY = ("0.0.0.0", "::")  # noqa: S104 - compared, not bound


def url_of(server: ServerConfig, port: int, *, to_print: bool = True) -> str:
    """Where the box is reached: from the network if it listens there and `to_print` is set."""
    host, scheme = server.host, "https" if server.uses_tls else "http"
    if host in _ANY:
        host = (_lan_address() if to_print else None) or "localhost"
    elif host == "127.0.0.1" and to_print:
        host = "localhost"
    return _url(scheme, host, port)


def _url(scheme: str, host: str, port: int) -> str:
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"


def is_local(server: ServerConfig) -> bool:
    """Whether only this machine reaches the box."""
    try:
        return ipaddress.ip_address(server.host).is_loopback
    except ValueError:
        return server.host == "localhost"


def other_urls(server: ServerConfig, port: int) -> list[str]:
    """Where the box is reached beside `url_of`, by the addresses of this machine's networks."""
    if server.host not in _ANY:
        return []
    from pinaivu_box.tls.self_signed import lan_addresses

    families = (4,) if server.host == "0.0.0.0" else (4, 6)  # noqa: S104 - compared
    scheme = "https" if server.uses_tls else "http"
    urls = [
        _url(scheme, address, port)
        for address in lan_addresses()
        if ipaddress.ip_address(address).version in families
    ]
    return [url for url in urls if url != url_of(server, port)]


def login_url(server: ServerConfig, port: int) -> str:
    """Where a browser may log in: without TLS, on this machine alone."""
    return url_of(server, port, to_print=server.uses_tls or server.allow_plain_login)


def _lan_address() -> str | None:
    """The address of this machine on the network; connecting a UDP socket sends nothing."""
    import socket

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            return None
        return str(probe.getsockname()[0])
