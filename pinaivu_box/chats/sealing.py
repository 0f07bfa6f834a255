"""How chats and memories are sealed, and how the key that seals them is wrapped.  No I/O.

An account has one random data key of 32 bytes.  It is stored only wrapped: by a key that Argon2id
makes of a password or a passphrase, and if the account wants it by another that comes from its
recovery key.  Each sealed row is a message of XChaCha20-Poly1305 (IETF) under the data key, with a
random nonce of 24 bytes:

    version (1 byte: 1)   nonce (24)   ciphertext and tag

Authenticated with it is what the row is: the version, its kind, the account's id, its own id, and
whatever else it belongs to.  So a row that stands in another's place is refused.
"""

from __future__ import annotations

import base64
import hashlib
import secrets
from typing import TypeVar

import msgspec
from nacl.bindings import (
    crypto_aead_xchacha20poly1305_ietf_ABYTES,
    crypto_aead_xchacha20poly1305_ietf_decrypt,
    crypto_aead_xchacha20poly1305_ietf_encrypt,
    crypto_aead_xchacha20poly1305_ietf_NPUBBYTES,
)
from nacl.exceptions import CryptoError
from nacl.pwhash import argon2id

from pinaivu_box.errors import Unreadable

VERSION = 1
KEY_BYTES = 32
SALT_BYTES: int = argon2id.SALTBYTES
# As for the hash of the password itself, which whoever steals the database could try as well.
OPS_LIMIT: int = argon2id.OPSLIMIT_INTERACTIVE
MEM_LIMIT: int = argon2id.MEMLIMIT_INTERACTIVE
_NONCE_BYTES: int = crypto_aead_xchacha20poly1305_ietf_NPUBBYTES
_TAG_BYTES: int = crypto_aead_xchacha20poly1305_ietf_ABYTES
_RECOVERY_BYTES = 20  # 160 random bits: nothing has to make guessing slow
_RECOVERY_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567"
_GROUP = 4  # letters, in a recovery key
_HEAD = bytes([VERSION])

T = TypeVar("T")


class RowSealer:
    """Seals the rows of one account.  `kind` and `ids` say what a row is, and are needed to open
    it."""

    def __init__(self, account_id: str, data_key: bytes) -> None:
        self.account_id = account_id
        self._key = data_key

    def seal(self, content: object, kind: str, *ids: str) -> bytes:
        """The content as msgpack, sealed."""
        return _encrypt(self._key, msgspec.msgpack.encode(content), self._context(kind, ids))

    def open(self, sealed: bytes, as_type: type[T], kind: str, *ids: str) -> T:
        """Raises Unreadable if it was sealed as something else, or with another key."""
        try:
            content = _decrypt(self._key, sealed, self._context(kind, ids))
            return msgspec.msgpack.decode(content, type=as_type)
        except (CryptoError, msgspec.DecodeError) as error:
            raise Unreadable(
                f"The {kind} {ids[0] if ids else ''} in the database is not what was sealed there: "
                "it was changed or damaged.  Restore a backup."
            ) from error

    def _context(self, kind: str, ids: tuple[str, ...]) -> bytes:
        return msgspec.json.encode([VERSION, kind, self.account_id, *ids])


def sealed_size(content: object) -> int:
    """The bytes of what `RowSealer.seal` makes of it."""
    return len(_HEAD) + _NONCE_BYTES + len(msgspec.msgpack.encode(content)) + _TAG_BYTES


def new_data_key() -> bytes:
    return secrets.token_bytes(KEY_BYTES)


def new_salt() -> bytes:
    return secrets.token_bytes(SALT_BYTES)


def wrapping_key(secret: str, salt: bytes, ops_limit: int, mem_limit: int) -> bytes:
    """Of a password or a passphrase.  Takes a fifth of a second and 64 MiB."""
    data = secret.encode(errors="surrogatepass")
    key: bytes = argon2id.kdf(KEY_BYTES, data, salt, ops_limit, mem_limit)
    return key


def new_recovery_key() -> str:
    text = base64.b32encode(secrets.token_bytes(_RECOVERY_BYTES)).decode()
    return "-".join(text[at : at + _GROUP] for at in range(0, len(text), _GROUP))


def recovery_wrapping_key(recovery_key: str, salt: bytes) -> bytes:
    """Spaces, hyphens and case do not matter, nor digits that look like the letters meant."""
    meant = recovery_key.upper().translate(str.maketrans("018", "OIB"))
    data = "".join(one for one in meant if one in _RECOVERY_LETTERS).encode()
    return hashlib.blake2b(
        data, digest_size=KEY_BYTES, salt=salt, person=b"pinaivu recovery"
    ).digest()


def wrap(data_key: bytes, wrapping: bytes, account_id: str, kind: str) -> bytes:
    return _encrypt(wrapping, data_key, _wrapped_as(account_id, kind))


def unwrap(wrapped: bytes, wrapping: bytes, account_id: str, kind: str) -> bytes | None:
    """The data key, or None if that is not what wraps it."""
    try:
        return _decrypt(wrapping, wrapped, _wrapped_as(account_id, kind))
    except CryptoError:
        return None


def _wrapped_as(account_id: str, kind: str) -> bytes:
    return msgspec.json.encode([VERSION, "data key", account_id, kind])


def _encrypt(key: bytes, content: bytes, context: bytes) -> bytes:
    nonce = secrets.token_bytes(_NONCE_BYTES)
    return _HEAD + nonce + crypto_aead_xchacha20poly1305_ietf_encrypt(content, context, nonce, key)


def _decrypt(key: bytes, sealed: bytes, context: bytes) -> bytes:
    """Raises CryptoError."""
    if sealed[:1] != _HEAD or len(sealed) < 1 + _NONCE_BYTES + _TAG_BYTES:
        raise CryptoError("sealed by another version")
    nonce, ciphertext = sealed[1 : 1 + _NONCE_BYTES], sealed[1 + _NONCE_BYTES :]
    return crypto_aead_xchacha20poly1305_ietf_decrypt(ciphertext, context, nonce, key)
