"""The certificate that a box makes for itself, in the folder `tls` of its home.

It is made once and stays, since people who have checked its fingerprint rely on that: a new one
takes its place only when it is near its end, or lacks a name that the configuration has.
"""

from __future__ import annotations

import ipaddress
import os
import re
import socket
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from pinaivu_box.errors import CliError
from pinaivu_box.server_config import ServerConfig

if TYPE_CHECKING:
    from cryptography import x509

CERT, KEY = "tls/self-signed.crt", "tls/self-signed.key"
_VALIDITY = timedelta(days=397)  # browsers take no certificate of more than 398 days
_RENEWED_BEFORE = timedelta(days=30)
_CLOCKS_DIFFER = timedelta(hours=1)
_LOCAL = ("localhost", "127.0.0.1", "::1")
_HOST_NAME = re.compile(r"[a-z0-9-]{1,63}(?:\.[a-z0-9-]{1,63}){0,8}")
_MAX_ADDRESSES = 32


def names_of(server: ServerConfig) -> tuple[str, ...]:
    """The names and addresses that the configuration wants in the certificate."""
    listen = () if server.host in ("0.0.0.0", "::") else (server.host,)  # noqa: S104
    return (*_LOCAL, *listen, *server.tls_names)


def ensure(home: Path, names: Sequence[str]) -> tuple[Path, Path]:
    """The paths of the certificate and its key, made unless there is one that will do.

    Raises CliError.
    """
    cert, key = home / CERT, home / KEY
    if not _will_do(cert, key, names):
        wanted = list(dict.fromkeys([*names, *_host_names(), *lan_addresses()]))
        try:
            _make(cert, key, wanted)
        except OSError as error:
            raise CliError(
                f"A certificate cannot be written to {cert.parent}: {error.strerror}."
            ) from error
    return cert, key


def _will_do(cert: Path, key: Path, names: Sequence[str]) -> bool:
    from cryptography import x509

    try:
        found = x509.load_pem_x509_certificate(cert.read_bytes())
        alternative = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (OSError, ValueError, x509.ExtensionNotFound):
        return False
    has = {
        *map(str.lower, alternative.get_values_for_type(x509.DNSName)),
        *map(str, alternative.get_values_for_type(x509.IPAddress)),
    }
    lasts = found.not_valid_after_utc > datetime.now(UTC) + _RENEWED_BEFORE
    return key.is_file() and lasts and {_canonical(name) for name in names} <= has


def _canonical(name: str) -> str:
    try:
        return str(ipaddress.ip_address(name))
    except ValueError:
        return name.lower()


def _host_names() -> list[str]:
    name = socket.gethostname().lower()
    return [name] if _HOST_NAME.fullmatch(name) else []


def lan_addresses() -> list[str]:
    """Those of this machine's network adapters, without those that work on one link only."""
    import ifaddr

    found = []
    for adapter in ifaddr.get_adapters():
        for each in adapter.ips:
            text = each.ip if isinstance(each.ip, str) else each.ip[0]
            address = ipaddress.ip_address(text.partition("%")[0])
            if not (address.is_link_local or address.is_loopback):
                found.append(str(address))
    return found[:_MAX_ADDRESSES]


def _make(cert: Path, key: Path, names: Sequence[str]) -> None:
    """Raises OSError."""
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import (
        Encoding,
        NoEncryption,
        PrivateFormat,
    )

    cert.parent.mkdir(mode=0o700, exist_ok=True)
    private = ec.generate_private_key(ec.SECP256R1())
    form = (Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    # A crash in between leaves two that do not match, which the next `ensure` must not take.
    cert.unlink(missing_ok=True)
    _write(key, private.private_bytes(*form))
    _write(cert, _signed(private, names).public_bytes(Encoding.PEM))


def _signed(private: object, names: Sequence[str]) -> x509.Certificate:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    assert isinstance(private, ec.EllipticCurvePrivateKey)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Pinaivu Box")])
    now = datetime.now(UTC)
    usage = x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=False,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(private.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCKS_DIFFER)
        .not_valid_after(now - _CLOCKS_DIFFER + _VALIDITY)
        .add_extension(x509.SubjectAlternativeName([*map(_general_name, names)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .sign(private, hashes.SHA256())
    )


def _general_name(name: str) -> x509.GeneralName:
    from cryptography import x509

    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _write(path: Path, data: bytes) -> None:
    """As a file of its owner's only that is there as a whole or not at all."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.unlink(missing_ok=True)
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
