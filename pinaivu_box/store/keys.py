"""API keys: made, stored as SHA-256, found again, revoked."""

from __future__ import annotations

import hashlib
import secrets
import string
import time
import zlib

import msgspec
from ulid import ULID

from pinaivu_box.store.database import Database, Row, Statement

PREFIX = "sk-pnv-"
_ALPHABET = string.digits + string.ascii_uppercase + string.ascii_lowercase
_RANDOM = 38  # 226 bits
_CHECKSUM = 6  # CRC-32 in base62
_SHOWN = len(PREFIX) + 6


class Key(msgspec.Struct, frozen=True):
    """A key as it is stored: not the key itself.  Times in Unix milliseconds."""

    id: str
    name: str
    prefix: str
    last_four: str
    admin: bool
    created_at: int
    expires_at: int | None
    revoked_at: int | None
    last_used_at: int | None
    requests: int
    tokens: int
    amount: int

    def expired(self, now: int) -> bool:
        return self.expires_at is not None and self.expires_at <= now


_COLUMNS = ", ".join(Key.__struct_fields__)


def generate() -> str:
    """A new secret: `sk-pnv-`, 38 random base62 characters and a 6-character checksum."""
    body = "".join(secrets.choice(_ALPHABET) for _ in range(_RANDOM))
    return PREFIX + body + _checksum(body)


def well_formed(secret: str) -> bool:
    """Whether the checksum fits: tells a mistyped or truncated key from an unknown one."""
    body = secret.removeprefix(PREFIX)
    if len(secret) != len(PREFIX) + _RANDOM + _CHECKSUM or not secret.startswith(PREFIX):
        return False
    return _checksum(body[:-_CHECKSUM]) == body[-_CHECKSUM:]


def _checksum(body: str) -> str:
    number = zlib.crc32(body.encode())
    digits = []
    for _ in range(_CHECKSUM):
        number, digit = divmod(number, len(_ALPHABET))
        digits.append(_ALPHABET[digit])
    return "".join(reversed(digits))


def hash_of(secret: str) -> bytes:
    # Plain SHA-256 suffices: the secret has 226 random bits, so there is nothing to guess.
    return hashlib.sha256(secret.encode()).digest()


def _key(row: Row) -> Key:
    return msgspec.convert(dict(row), Key, strict=False)


async def create(
    database: Database, *, name: str, admin: bool, expires_at: int | None
) -> tuple[Key, str]:
    """Store a new key; returns it with its secret, which is nowhere else."""
    secret = generate()
    key = Key(
        id=f"key_{ULID()}".lower(),
        name=name,
        prefix=secret[:_SHOWN],
        last_four=secret[-4:],
        admin=admin,
        created_at=time.time_ns() // 1_000_000,
        expires_at=expires_at,
        revoked_at=None,
        last_used_at=None,
        requests=0,
        tokens=0,
        amount=0,
    )
    await database.write(
        (
            "INSERT INTO keys (id, hash, name, prefix, last_four, admin, created_at, expires_at)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (
                key.id,
                hash_of(secret),
                key.name,
                key.prefix,
                key.last_four,
                int(key.admin),
                key.created_at,
                key.expires_at,
            ),
        )
    )
    return key, secret


async def find(database: Database, secret: str) -> Key | None:
    rows = await database.read(f"SELECT {_COLUMNS} FROM keys WHERE hash = ?", (hash_of(secret),))
    return _key(rows[0]) if rows else None


async def ls(database: Database) -> list[Key]:
    return [_key(row) for row in await database.read(f"SELECT {_COLUMNS} FROM keys ORDER BY id")]


async def named(database: Database, id_or_prefix: str) -> list[Key]:
    """Keys with that id, or whose shown prefix begins so."""
    keys = await ls(database)
    exact = [key for key in keys if key.id == id_or_prefix]
    if exact or not id_or_prefix:
        return exact
    # A whole secret may be pasted too: its beginning is the shown prefix.
    return [
        key
        for key in keys
        if key.prefix.startswith(id_or_prefix)
        or (id_or_prefix.startswith(key.prefix) and id_or_prefix.endswith(key.last_four))
    ]


async def revoke(database: Database, key_id: str) -> None:
    """From its commit on, no request with that key passes."""
    await database.write(
        (
            "UPDATE keys SET revoked_at = ? WHERE id = ? AND revoked_at IS NULL",
            (time.time_ns() // 1_000_000, key_id),
        )
    )


def charge(key_id: str, *, tokens: int, amount: int, now: int) -> Statement:
    """The key's counters for one request, for the transaction of its receipt."""
    return (
        "UPDATE keys SET requests = requests + 1, tokens = tokens + ?, amount = amount + ?,"
        " last_used_at = max(coalesce(last_used_at, 0), ?) WHERE id = ?",
        (tokens, amount, now, key_id),
    )
