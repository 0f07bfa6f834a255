"""The encrypted form of a backup, written and read in chunks; its layout is in the package."""

from __future__ import annotations

import secrets
import struct
from typing import BinaryIO

from nacl import bindings as sodium
from nacl.exceptions import CryptoError
from nacl.pwhash import argon2id

MAGIC = b"pinaivu-sealed/1\n"
_LIMITS = struct.Struct("<QQ")
_CHUNK = 65536
_TAG_BYTES = sodium.crypto_secretstream_xchacha20poly1305_ABYTES
_HEADER_BYTES = sodium.crypto_secretstream_xchacha20poly1305_HEADERBYTES
_FINAL = sodium.crypto_secretstream_xchacha20poly1305_TAG_FINAL
_MESSAGE = sodium.crypto_secretstream_xchacha20poly1305_TAG_MESSAGE
# What a file may cost before it is known to be a backup.
_MAX_OPERATIONS, _MAX_MEMORY_BYTES = 16, 1 << 30


class BadBackup(ValueError):
    """The file is not a valid backup; the message is a clause that says why."""


class Sealer:
    """Encrypts what is written to it; `finish` marks the end."""

    def __init__(self, file: BinaryIO, passphrase: str) -> None:
        salt = secrets.token_bytes(argon2id.SALTBYTES)
        limits = (argon2id.OPSLIMIT_MODERATE, argon2id.MEMLIMIT_MODERATE)
        self._file = file
        self._waiting = bytearray()
        self._preamble = MAGIC + salt + _LIMITS.pack(*limits)
        self._state = sodium.crypto_secretstream_xchacha20poly1305_state()
        header = sodium.crypto_secretstream_xchacha20poly1305_init_push(
            self._state, _key(passphrase, salt, *limits)
        )
        file.write(self._preamble + header)

    def write(self, data: bytes) -> None:
        self._waiting += data
        # The last chunk is not sent before `finish`: it carries the tag.
        while len(self._waiting) > _CHUNK:
            self._push(bytes(self._waiting[:_CHUNK]), _MESSAGE)
            del self._waiting[:_CHUNK]

    def finish(self) -> None:
        self._push(bytes(self._waiting), _FINAL)

    def _push(self, text: bytes, tag: int) -> None:
        self._file.write(
            sodium.crypto_secretstream_xchacha20poly1305_push(
                self._state, text, self._preamble, tag
            )
        )


class Unsealer:
    """Decrypts what a Sealer wrote; returns authenticated data only."""

    def __init__(self, file: BinaryIO, passphrase: str) -> None:
        preamble = file.read(len(MAGIC) + argon2id.SALTBYTES + _LIMITS.size)
        header = file.read(_HEADER_BYTES)
        if not preamble.startswith(MAGIC) or len(header) < _HEADER_BYTES:
            raise BadBackup("it is truncated")
        operations, memory = _LIMITS.unpack(preamble[-_LIMITS.size :])
        if operations > _MAX_OPERATIONS or memory > _MAX_MEMORY_BYTES:
            raise BadBackup("the cost of its key exceeds the maximum")
        salt = preamble[len(MAGIC) : -_LIMITS.size]
        self._file = file
        self._preamble = preamble
        self._ready = bytearray()
        self._chunks = 0
        self._ended = False
        self._state = sodium.crypto_secretstream_xchacha20poly1305_state()
        sodium.crypto_secretstream_xchacha20poly1305_init_pull(
            self._state, header, _key(passphrase, salt, operations, memory)
        )

    def read(self, size: int) -> bytes:
        """Read that many bytes, or fewer at the end.  Raises BadBackup, OSError."""
        while len(self._ready) < size and not self._ended:
            self._ready += self._pull()
        data = bytes(self._ready[:size])
        del self._ready[:size]
        return data

    def _pull(self) -> bytes:
        sealed = self._file.read(_CHUNK + _TAG_BYTES)
        if len(sealed) < _TAG_BYTES:
            raise BadBackup("it is truncated")
        try:
            text, tag = sodium.crypto_secretstream_xchacha20poly1305_pull(
                self._state, sealed, self._preamble
            )
        except CryptoError:
            raise BadBackup(
                "it was modified or truncated"
                if self._chunks
                else "the passphrase is wrong, or its beginning was modified"
            ) from None
        self._chunks += 1
        self._ended = tag == _FINAL
        if self._ended and self._file.read(1):
            raise BadBackup("there is data after its end")
        return text


def _key(passphrase: str, salt: bytes, operations: int, memory: int) -> bytes:
    size = sodium.crypto_secretstream_xchacha20poly1305_KEYBYTES
    try:
        return argon2id.kdf(size, passphrase.encode(), salt, operations, memory)
    except (CryptoError, ValueError) as error:  # limits below the minimum, or no memory
        raise BadBackup(f"its key cannot be computed ({error})") from error
