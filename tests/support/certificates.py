"""Certificates for tests, as files in PEM."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
)
from cryptography.x509.oid import NameOID


def make_certificate(
    folder: Path,
    *,
    name: str = "server",
    days: float = 90,
    since: float = 1,
    passphrase: bytes | None = None,
) -> tuple[Path, Path]:
    """A certificate for localhost that has been valid for `since` days and will be for `days` more;
    the paths of it and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=since))
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    cert_path, key_path = folder / f"{name}.crt", folder / f"{name}.key"
    cert_path.write_bytes(made.public_bytes(Encoding.PEM))
    lock = BestAvailableEncryption(passphrase) if passphrase else NoEncryption()
    key_path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, lock))
    return cert_path, key_path


def fingerprint(pem: bytes | Path) -> str:
    """SHA-256 of a certificate, as the banner shows it."""
    data = pem.read_bytes() if isinstance(pem, Path) else pem
    found = x509.load_pem_x509_certificates(data)[0]
    return found.fingerprint(hashes.SHA256()).hex(":").upper()
