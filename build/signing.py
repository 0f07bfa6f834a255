"""The release key: makes one, and signs with it.  Run by .venv's Python.

signing.py new KEY PUBLIC       makes a key: the private half in KEY, the public one in PUBLIC
signing.py public KEY           prints the public half
signing.py sign KEY SUMS SIG    signs the file SUMS into SIG
"""

import os
import sys
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

MAX_KEY_BYTES = 4096


class SigningRefused(Exception):
    """Its message is a sentence."""


def new(path: Path, public: Path) -> None:
    for existing in (path, public):
        if existing.exists():
            raise SigningRefused(
                f"{existing} is there already: a release key is not replaced by mistake"
            )
    key = Ed25519PrivateKey.generate()
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    # Nobody else can read it at any time, and an existing file is never written to.
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "wb") as file:
        file.write(pem)
        file.flush()
        os.fsync(file.fileno())
    public.write_bytes(public_half(key))


def read(path: Path) -> Ed25519PrivateKey:
    """Raises SigningRefused."""
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode & 0o777
            pem = file.read(MAX_KEY_BYTES)
    except OSError as error:
        raise SigningRefused(f"the release key {path} cannot be read: {error.strerror}") from error
    if mode & 0o077:
        raise SigningRefused(
            f"others can read the release key {path} (its mode is {mode:o}): run 'chmod 600 {path}'"
        )
    try:
        key = load_pem_private_key(pem, None)
    except (ValueError, TypeError) as error:
        raise SigningRefused(f"{path} is no private key in PEM form without a password") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise SigningRefused(f"{path} is no Ed25519 key: build/release --new-key FILE makes one")
    return key


def public_half(key: Ed25519PrivateKey) -> bytes:
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def main(command: str, *paths: str) -> None:
    key, *others = map(Path, paths)
    if command == "new":
        new(key, *others)
    elif command == "public":
        sys.stdout.buffer.write(public_half(read(key)))
    else:
        sums, signature = others
        signature.write_bytes(read(key).sign(sums.read_bytes()))


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except SigningRefused as refused:
        print(refused, file=sys.stderr)
        sys.exit(1)
