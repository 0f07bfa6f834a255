"""The certificate that the server shows: read, checked, and put into the context of its sockets."""

from __future__ import annotations

import ssl
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pinaivu_box.errors import CliError
from pinaivu_box.models.regular_files import open_regular
from pinaivu_box.server_config import ServerConfig
from pinaivu_box.tls import self_signed
from pinaivu_box.tls.pinned import publish as publish

if TYPE_CHECKING:
    from cryptography import x509

_MAX_BYTES = 1024 * 1024


@dataclass(frozen=True)
class ServerCertificate:
    """Two PEM files.  `expires` in Unix seconds; `fingerprint` is SHA-256 of the certificate, as
    browsers show it."""

    cert: Path
    key: Path
    pem: bytes
    fingerprint: str
    expires: float


def of(server: ServerConfig, home: Path) -> ServerCertificate | None:
    """That of the configuration, None without TLS; the box's own is made or renewed if need be.

    Raises CliError.
    """
    if server.tls:
        cert, key = self_signed.ensure(home, self_signed.names_of(server))
        return read(cert, key)
    if server.tls_cert:
        return read(Path(server.tls_cert).expanduser(), Path(server.tls_key).expanduser())
    return None


def read(cert: Path, key: Path) -> ServerCertificate:
    """Raises CliError if the files cannot be read, do not belong together, or the certificate is
    not valid now."""
    from cryptography.hazmat.primitives import hashes

    data = _bytes(cert, "certificate")
    leaf = _leaf(cert, data)
    _check_key(cert, leaf, key)
    now, begins = time.time(), leaf.not_valid_before_utc.timestamp()
    expires = leaf.not_valid_after_utc.timestamp()
    if expires <= now:
        raise CliError(
            f"The certificate {cert} expired on {leaf.not_valid_after_utc:%Y-%m-%d}: get a new one."
        )
    if begins > now:
        raise CliError(
            f"The certificate {cert} is valid from {leaf.not_valid_before_utc:%Y-%m-%d} on only: "
            "check the clock, or use another one."
        )
    digest = leaf.fingerprint(hashes.SHA256()).hex(":").upper()
    return ServerCertificate(cert, key, data, digest, expires)


def _bytes(path: Path, what: str) -> bytes:
    try:
        with open_regular(path) as file:
            data = file.read(_MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CliError(f"The {what} {path} cannot be read: {reason}.") from error
    if len(data) > _MAX_BYTES:
        raise CliError(f"The {what} {path} is no PEM file: it is too long.")
    return data


def _leaf(path: Path, data: bytes) -> x509.Certificate:
    from cryptography import x509

    try:
        return x509.load_pem_x509_certificates(data)[0]
    except ValueError as error:
        raise CliError(f"{path} holds no certificate in PEM.") from error


def _check_key(cert: Path, leaf: x509.Certificate, key: Path) -> None:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import (
        Encoding,
        PublicFormat,
        load_pem_private_key,
    )

    data = _bytes(key, "key")
    try:
        private = load_pem_private_key(data, password=None)
    except TypeError as error:
        raise CliError(
            f"The key {key} has a passphrase, which nobody is there to enter: store it without "
            "one, readable for its owner only."
        ) from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise CliError(f"{key} holds no private key in PEM.") from error
    form = (Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    if private.public_key().public_bytes(*form) != leaf.public_key().public_bytes(*form):
        raise CliError(
            f"The key {key} does not belong to the certificate {cert}, whose own certificate must "
            "come first in the file."
        )


def context_of(certificate: ServerCertificate) -> ssl.SSLContext:
    """For the server's sockets.  Raises CliError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION
    context.set_ciphers("ECDHE+AESGCM:ECDHE+CHACHA20")
    context.set_alpn_protocols(["h2", "http/1.1"])
    _load(certificate, context)
    return context


def use(certificate: ServerCertificate, context: ssl.SSLContext, home: Path) -> None:
    """Show it on new connections, and tell commands on this home.  Raises CliError; then those have
    the old one."""
    _load(certificate, ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))  # a failure leaves half of it
    _load(certificate, context)
    publish(home, certificate.pem)


def _load(certificate: ServerCertificate, context: ssl.SSLContext) -> None:
    try:
        context.load_cert_chain(certificate.cert, certificate.key, password=_no_passphrase)
    except (OSError, ValueError) as error:  # of which ssl.SSLError is one
        raise CliError(f"The certificate {certificate.cert} cannot be used: {error}.") from error


def _no_passphrase() -> str:
    raise ValueError("its key has a passphrase")  # OpenSSL would ask the terminal
