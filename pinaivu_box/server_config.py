"""`[server]` of the configuration: where the box listens, and whom it believes what."""

from __future__ import annotations

import ipaddress
import re
from typing import Annotated, Literal

from msgspec import Meta

from pinaivu_box.config_section import Port, PositiveInt, Section

_CONTACT = re.compile(r"https?://[!-~]+|[^\s@:/]+@[^\s@]+")
_HOST_NAME = re.compile(r"(?=[!-~]{1,253}(?![\s\S]))[a-z0-9_-]{1,63}(?:\.[a-z0-9_-]{1,63})*")


class AnonymousKeyConfig(Section, frozen=True):
    """The key that requests without a credential have, if they come from these networks (CIDR) and
    ask for an IP address or one of these names."""

    key: str = ""
    networks: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ("localhost",)


class ServerConfig(Section, frozen=True):
    host: str = "127.0.0.1"
    port: Port = 4001
    # HTTPS: with a certificate of its own making, or with that in these PEM files.
    tls: Literal["", "self-signed"] = ""
    tls_cert: str = ""
    tls_key: str = ""
    # More names and addresses in the certificate that the box makes.
    tls_names: Annotated[tuple[str, ...], Meta(max_length=32)] = ()
    # Addresses and networks of proxies that are believed for whom they forward a request.
    trusted_proxies: Annotated[tuple[str, ...], Meta(max_length=64)] = ()
    max_body_bytes: PositiveInt = 10 * 1024 * 1024
    cors_origins: tuple[str, ...] = ("*",)
    # From which hosts images that requests name by URL are had: names, addresses, networks.
    image_hosts: tuple[str, ...] = ()
    # Whom users can ask; named in errors that only the operator can resolve.
    contact: Annotated[str, Meta(max_length=200)] = ""
    drain_seconds: Annotated[float, Meta(ge=0)] = 60.0
    # How long the status of a stream waits for the first token, so that a failure has its own
    # status; after that, 200 is sent, and comments keep the connection alive.
    stream_grace_seconds: Annotated[float, Meta(ge=0)] = 10.0
    # Whether passwords are taken over plain HTTP from other machines.
    allow_plain_login: bool = False
    anonymous_key: AnonymousKeyConfig = AnonymousKeyConfig()

    @property
    def uses_tls(self) -> bool:
        return bool(self.tls or self.tls_cert)


def check(server: ServerConfig) -> None:
    """Raises ValueError."""
    _check_anonymous(server.anonymous_key)
    if server.contact and not _CONTACT.fullmatch(server.contact):
        raise ValueError(f"server.contact is '{server.contact}': write an email address or a URL")
    for host in server.image_hosts:
        if not _HOST_NAME.fullmatch(host) and not is_network(host):
            raise ValueError(
                f"server.image_hosts has '{host}', which is no host name, IP address or network, "
                "such as images.example.com or 192.168.1.0/24"
            )
    if bool(server.tls_cert) != bool(server.tls_key):
        missing = "tls_key" if server.tls_cert else "tls_cert"
        raise ValueError(
            f"server.{missing} is missing: tls_cert and tls_key are the two files of one "
            "certificate, in PEM"
        )
    if server.tls and server.tls_cert:
        raise ValueError(
            "server.tls is 'self-signed', and server.tls_cert names a certificate: leave one out"
        )
    for name in server.tls_names:
        if not _HOST_NAME.fullmatch(name) and ("/" in name or not is_network(name)):
            raise ValueError(f"server.tls_names has '{name}', which is no host name or IP address")
    for network in server.trusted_proxies:
        if not is_network(network):
            raise ValueError(
                f"server.trusted_proxies has '{network}', which is no IP address or network, such "
                "as 127.0.0.1 or 10.0.0.0/8"
            )


def _check_anonymous(anonymous: AnonymousKeyConfig) -> None:
    if anonymous.key.startswith("sk-pnv-"):
        raise ValueError("server.anonymous_key.key has a secret: write the key's name or its id")
    if anonymous.key and not anonymous.networks:
        raise ValueError(
            'server.anonymous_key needs networks, such as ["127.0.0.0/8", "192.168.1.0/24"]'
        )
    for network in anonymous.networks:
        try:
            ipaddress.ip_network(network)
        except ValueError as error:
            raise ValueError(f"server.anonymous_key.networks: {error}") from None


def is_network(text: str) -> bool:
    """Whether it is an IP address, or a network of them."""
    try:
        ipaddress.ip_network(text)
    except ValueError:
        return False
    return True
