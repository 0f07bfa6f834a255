"""Addresses of this box, as commands print them."""

from __future__ import annotations

from pinaivu_box.server_config import ServerConfig


def url_of(server: ServerConfig, port: int, *, to_print: bool = True) -> str:
    """Where the box is reached: from the network if it listens there and `to_print` is set."""
    host, scheme = server.host, "https" if server.uses_tls else "http"
    if host in ("0.0.0.0", "::"):  # noqa: S104 - compared, not bound
        host = (_lan_address() if to_print else None) or "localhost"
    elif host == "127.0.0.1" and to_print:
        host = "localhost"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"


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
