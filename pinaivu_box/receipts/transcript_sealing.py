"""Seals transcripts to whoever has an API key's secret.  No I/O.

    private key  HKDF-SHA256 (RFC 5869) of the secret's ASCII characters, without salt, with the
                 info "pinaivu/transcript-key/v1": 32 bytes
    public half  X25519 (RFC 7748) of the private key and the base point
    sealed       libsodium's crypto_box_seal of the transcript to the public half

Only the public half is stored, so nobody without the secret opens what is sealed, the box included:
it sees the secret while a request presents it, and keeps nothing of it.  A secret has 226 random
bits, so nothing has to make guessing slow.  Whoever can write the database can put another
sealed transcript in the place of one; that is found by the receipt's commitments.
"""

from __future__ import annotations

import hashlib
import hmac

from nacl.exceptions import CryptoError
from nacl.public import PrivateKey, PublicKey, SealedBox

from pinaivu_box.errors import Unreadable

KEY_BYTES = 32
SEAL_BYTES = 48  # that a sealed text has more: a public key, and what authenticates it
_INFO = b"pinaivu/transcript-key/v1"


def public_half(secret: str) -> bytes:
    """What transcripts for that secret are sealed to."""
    return bytes(_private_key(secret).public_key)


def seal(content: bytes, public: bytes) -> bytes:
    sealed: bytes = SealedBox(PublicKey(public)).encrypt(content)
    return sealed


def open_sealed(sealed: bytes, secret: str) -> bytes:
    """Raises Unreadable if it was sealed to another secret, or changed."""
    try:
        content: bytes = SealedBox(_private_key(secret)).decrypt(sealed)
    except (CryptoError, ValueError) as error:
        raise Unreadable(
            "The transcript is not sealed to this key's secret: it needs the one that the key had "
            "when the request was made."
        ) from error
    return content


def _private_key(secret: str) -> PrivateKey:
    return PrivateKey(hkdf_sha256(secret.encode(), _INFO))


def hkdf_sha256(key: bytes, info: bytes) -> bytes:
    """32 bytes by HKDF-SHA256 (RFC 5869) without salt.  Not from `cryptography`, which would be
    loaded at each start for these two lines."""
    extracted = hmac.digest(bytes(hashlib.sha256().digest_size), key, "sha256")
    return hmac.digest(extracted, info + b"\x01", "sha256")
