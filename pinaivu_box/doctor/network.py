"""Checks of how clients reach the box: its certificate, the proxies that it believes, and
single sign-on."""

from __future__ import annotations

import asyncio
import ipaddress
import time
from collections.abc import Iterator
from pathlib import Path

from pinaivu_box.config import Config
from pinaivu_box.doctor.check import Check
from pinaivu_box.errors import SignOnUnavailable
from pinaivu_box.login.provider import Provider
from pinaivu_box.settings import read_oidc_secret
from pinaivu_box.tls import certificate as certificates
from pinaivu_box.tls import self_signed
from pinaivu_box.tls.certificate import ServerCertificate

_SOON_DAYS = 14
_DAY = 86400.0


def tls(config: Config, home: Path) -> Check:
    """Raises CliError if the certificate cannot be used.  Makes none."""
    server = config.server
    if not server.uses_tls:
        return Check("TLS", "ok", "off: the API is served over plain HTTP")
    if server.tls and not (home / self_signed.CERT).exists():
        return Check("TLS", "ok", "no certificate yet: the first start makes it")
    cert, key = (
        (home / self_signed.CERT, home / self_signed.KEY)
        if server.tls
        else (Path(server.tls_cert).expanduser(), Path(server.tls_key).expanduser())
    )
    found = certificates.read(cert, key)
    return expiry(found, time.time(), renewed=bool(server.tls))


def expiry(certificate: ServerCertificate, now: float, *, renewed: bool) -> Check:
    """`now` in Unix seconds; `renewed` if the box does that by itself."""
    days = int((certificate.expires - now) / _DAY)
    day = time.strftime("%Y-%m-%d", time.gmtime(certificate.expires))
    finding = f"the certificate is valid until {day}; SHA-256 {certificate.fingerprint}"
    if days >= _SOON_DAYS:
        return Check("TLS", "ok", finding)
    todo = "restart the box" if renewed else "get a new one, then 'pinaivu reload'"
    return Check("TLS", "warning", f"{finding}: {days} days are left", todo)


def sign_on(config: Config) -> Iterator[Check]:
    """Raises CliError if the secret cannot be read."""
    oidc = config.login.oidc
    secret = read_oidc_secret(config)
    if not oidc.issuer:
        return
    try:
        asyncio.run(Provider(oidc, secret).endpoints())
    except SignOnUnavailable as error:
        todo = "passwords work until it does: check login.oidc.issuer, and the network"
        yield Check("sign-on", "warning", error.message.partition(". ")[0], todo)
    else:
        yield Check("sign-on", "ok", f"{oidc.issuer} answers")


def proxies(config: Config) -> Iterator[Check]:
    for text in config.server.trusted_proxies:
        if ipaddress.ip_network(text).prefixlen == 0:
            finding = f"trusted_proxies has {text}: every client can claim any address"
            yield Check("proxies", "failed", finding, "write the addresses of your proxies there")
