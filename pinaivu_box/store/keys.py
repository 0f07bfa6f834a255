"""API keys: created, stored as SHA-256, found by their secret, changed, rotated, revoked."""

from __future__ import annotations

import hashlib
import secrets
import string
import zlib
from typing import Any

import msgspec
from msgspec import UNSET, UnsetType
from ulid import ULID

from pinaivu_box import policy as policies
from pinaivu_box.config import parse_span
from pinaivu_box.errors import InvalidValue, RowConflict, RowNotFound
from pinaivu_box.policy import LONGEST_LIFE, Policy
from pinaivu_box.receipts.transcript_sealing import public_half
from pinaivu_box.store import accounts
from pinaivu_box.store.accounts import Account
from pinaivu_box.store.audit import Actor, record
from pinaivu_box.store.database import Database, Row, SqlStatement
from pinaivu_box.store.times import now_ms, time_text

PREFIX = "sk-pnv-"
_ALPHABET = string.digits + string.ascii_uppercase + string.ascii_lowercase
_RANDOM_CHARACTERS = 38  # 226 bits
_CHECKSUM_CHARACTERS = 6  # CRC-32 in base62
_SHOWN_CHARACTERS = len(PREFIX) + 6


class Key(msgspec.Struct, frozen=True):
    """A key as it is stored, without its secret.  Times are Unix milliseconds, amounts 10^-9 of the
    currency.

    `blocked` is the reason, if it is blocked.  `spent` is what it used of its budget in the period
    that began at `spent_since`, `spent_before` (JSON) the same of the other periods that it was
    charged in lately: the clock may have been wrong in any of them.  The secret before the last
    rotation is valid until `old_until`.  `transcript_key` is what transcripts are sealed to, made
    of the present secret (`receipts.transcript_sealing`); None until a key of an earlier version is
    used.
    """

    id: str
    account_id: str
    account: str
    name: str
    prefix: str
    last_four: str
    policy: Policy
    created_at: int
    expires_at: int | None = None
    revoked_at: int | None = None
    blocked: str | None = None
    old_until: int | None = None
    last_used_at: int | None = None
    requests: int = 0
    tokens: int = 0
    amount: int = 0
    spent: int = 0
    spent_since: int = 0
    spent_before: str = "{}"
    transcript_key: bytes | None = None

    @property
    def periods(self) -> dict[int, int]:
        """What it spent in each known period, by the period's beginning."""
        before = msgspec.json.decode(self.spent_before, type=dict[int, int])
        return {**before, self.spent_since: self.spent}

    def spent_in(self, begin: int, end: int | None) -> int:
        return sum(n for since, n in self.periods.items() if in_period(since, begin, end))

    @property
    def label(self) -> str:
        """The key in a sentence."""
        return f"{self.prefix}..." if self.prefix else f"'{self.name}' of {self.account}"

    @property
    def admin(self) -> bool:
        return "admin" in self.policy.scopes

    def expired(self, now: int) -> bool:
        return self.expires_at is not None and self.expires_at <= now

    def state(self, now: int) -> str:
        if self.revoked_at is not None:
            return "revoked"
        return "expired" if self.expired(now) else "blocked" if self.blocked else "active"


_COMPUTED_COLUMNS = {
    "account": "accounts.name AS account",
    "spent_before": "(SELECT json_group_object(since, spent) FROM spent_before"
    " WHERE key_id = keys.id) AS spent_before",
}
_COLUMNS = ", ".join(_COMPUTED_COLUMNS.get(name, f"keys.{name}") for name in Key.__struct_fields__)
_FROM = "FROM keys JOIN accounts ON accounts.id = keys.account_id"
FIND = f"SELECT {_COLUMNS}, keys.hash <> ?1 AS old {_FROM} WHERE keys.hash = ?1 OR old_hash = ?1"
_PAGE = "keys.id < ? ORDER BY keys.id DESC LIMIT ?"
LS = f"SELECT {_COLUMNS} {_FROM} WHERE {_PAGE}"
LS_OF_ACCOUNT = f"SELECT {_COLUMNS} {_FROM} WHERE keys.account_id = ? AND {_PAGE}"
_LAST = "\U0010ffff"  # after all that begins with the same text
# The keys whose name or secret begins so, each by an index.
BEGINNING = (
    "keys.id IN (SELECT id FROM keys WHERE name >= ?1 AND name < ?1 || ?2"
    " UNION SELECT id FROM keys WHERE prefix >= ?1 AND prefix < ?1 || ?2)"
)
_NEWER_THAN_ALL = "l"  # ids begin with key_
_MAX_TEXT_CHARACTERS = 200
MAX_PERIODS = 32  # of a budget that are kept of a key, beside the present one
# A rotation is routine by default, and programs that use the old secret need time to change.  For a
# secret that has leaked the overlap is 0.
OVERLAP = "24h"
_UNREADABLE = "its settings were written by a newer version, update this program"
_policies = msgspec.json.Decoder(Policy)


def generate() -> str:
    """A new secret: `sk-pnv-`, 38 random base62 characters and a 6-character checksum."""
    body = "".join(secrets.choice(_ALPHABET) for _ in range(_RANDOM_CHARACTERS))
    return PREFIX + body + _checksum(body)


def well_formed(secret: str) -> bool:
    """Whether the checksum is right: tells a mistyped or truncated key from an unknown one."""
    body = secret.removeprefix(PREFIX)
    if not secret.startswith(PREFIX) or len(body) != _RANDOM_CHARACTERS + _CHECKSUM_CHARACTERS:
        return False
    return _checksum(body[:-_CHECKSUM_CHARACTERS]) == body[-_CHECKSUM_CHARACTERS:]


def _checksum(body: str) -> str:
    number = zlib.crc32(body.encode())
    digits = []
    for _ in range(_CHECKSUM_CHARACTERS):
        number, digit = divmod(number, len(_ALPHABET))
        digits.append(_ALPHABET[digit])
    return "".join(reversed(digits))


def hash_of(secret: str) -> bytes:
    # Plain SHA-256 suffices: the secret has 226 random bits, which cannot be guessed.
    return hashlib.sha256(secret.encode()).digest()


def _key(row: Row) -> Key:
    fields = {name: row[name] for name in Key.__struct_fields__}
    try:
        fields["policy"] = _policies.decode(row["policy"])
        policies.check(fields["policy"])
    except ValueError:
        # An unknown setting may be a limit: this key is blocked, and no other.
        fields |= {"policy": Policy(scopes=()), "blocked": _UNREADABLE}
    return Key(**fields)


def new(
    account: Account, name: str, policy: Policy, expires_at: int | None, by: Actor
) -> tuple[Key, str, SqlStatement, SqlStatement]:
    """A new key, its secret, and the statements that store it, which fail with
    sqlite3.IntegrityError if the account was removed meanwhile.

    Raises InvalidValue.
    """
    _check_text("name", name)
    _check(policy, account)
    secret = generate()
    key = Key(
        id=f"key_{ULID()}".lower(),
        account_id=account.id,
        account=account.name,
        name=name,
        prefix=secret[:_SHOWN_CHARACTERS],
        last_four=secret[-4:],
        policy=policy,
        created_at=now_ms(),
        expires_at=expires_at,
        transcript_key=public_half(secret),
    )
    shown = (name, key.prefix, key.last_four)
    settings = (msgspec.json.encode(policy).decode(), key.created_at, expires_at)
    detail = {"name": name, "account": account.name, "policy": policy}
    return (
        key,
        secret,
        (
            "INSERT INTO keys (id, hash, name, prefix, last_four, policy, created_at, expires_at,"
            " transcript_key, account_id) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?,"
            " (SELECT id FROM accounts WHERE id = ? AND removed_at IS NULL))",
            (key.id, hash_of(secret), *shown, *settings, key.transcript_key, account.id),
        ),
        record(by, "key.create", key.id, **detail, expires_at=time_text(expires_at)),
    )


async def find(database: Database, secret: str) -> tuple[Key, bool] | None:
    """The key with a secret, and whether that is its secret from before the last rotation."""
    rows = await database.read(FIND, (hash_of(secret),))
    return (_key(rows[0]), bool(rows[0]["old"])) if rows else None


async def keep_transcript_key(database: Database, key: Key, secret: str) -> Key:
    """Store what transcripts are sealed to, for a key of an earlier version, whose present secret
    is at hand; returns the key with it."""
    public = public_half(secret)
    await database.write(
        (
            "UPDATE keys SET transcript_key = ? WHERE id = ? AND hash = ?",
            (public, key.id, hash_of(secret)),
        )
    )
    return msgspec.structs.replace(key, transcript_key=public)


async def exist(database: Database, *, beside: str = "") -> bool:
    """Whether there are keys, `beside` those of that name."""
    return bool(await database.read("SELECT 1 FROM keys WHERE name <> ? LIMIT 1", (beside,)))


async def ls(
    database: Database,
    account_id: str | None = None,
    *,
    beginning: str = "",
    usable: bool = False,
    after: str | None = None,
    limit: int = 100,
) -> list[Key]:
    """The newest `limit` keys, of an account if one is given, older than the key `after`; newest
    first.  With a `beginning` only those whose name or secret begins so, and only those that are
    not revoked with `usable`."""
    page = (after or _NEWER_THAN_ALL, limit)
    if beginning or usable:
        rows = await database.scan(*_selected(account_id, beginning, usable, page))
    elif account_id is None:
        rows = await database.scan(LS, page)
    else:
        rows = await database.scan(LS_OF_ACCOUNT, (account_id, *page))
    return [_key(row) for row in rows]


def _selected(
    account_id: str | None, beginning: str, usable: bool, page: tuple[str, int]
) -> SqlStatement:
    # A secret that was pasted whole finds its key: its beginning is stored.
    text = beginning[:_SHOWN_CHARACTERS] if beginning.startswith(PREFIX) else beginning
    conditions = ["(?3 IS NULL OR keys.account_id = ?3)", *([BEGINNING] if beginning else [])]
    if usable:
        conditions.append("keys.revoked_at IS NULL")
    return (
        f"SELECT {_COLUMNS} {_FROM} WHERE {' AND '.join(conditions)} AND keys.id < ?4"
        " ORDER BY keys.id DESC LIMIT ?5",
        (text, _LAST, account_id, *page),
    )


async def with_budget(database: Database, account_id: str, *, used_since: int) -> list[Key]:
    """The keys of an account that have a budget, without those that are revoked and were not used
    since then."""
    rows = await database.scan(
        f"SELECT {_COLUMNS} {_FROM} WHERE keys.account_id = ?1"
        " AND keys.policy ->> '$.budget' IS NOT NULL"
        " AND (keys.revoked_at IS NULL OR keys.last_used_at >= ?2)",
        (account_id, used_since),
    )
    return [_key(row) for row in rows]


async def get(database: Database, key_id: str) -> Key:
    """Raises RowNotFound."""
    rows = await database.read(f"SELECT {_COLUMNS} {_FROM} WHERE keys.id = ?", (key_id,))
    if not rows:
        raise RowNotFound("There is no key with this id: list the keys to see theirs.")
    return _key(rows[0])


async def named(database: Database, text: str, account_id: str | None = None) -> Key:
    """The key with that id or name, or whose secret is or begins with the text; in an account if
    one is given.  Of several with the same name, the one that is not revoked.

    Raises RowNotFound, also if several match.
    """
    last = text[-4:] if len(text) > _SHOWN_CHARACTERS else ""
    rows = await database.read(
        f"SELECT {_COLUMNS} {_FROM} WHERE (keys.id = ?1 OR (?1 <> '' AND keys.name = ?1)"
        " OR (?2 <> '' AND keys.prefix >= ?2 AND keys.prefix < ?2 || x'f48fbfbf'"
        "     AND (?3 = '' OR keys.last_four = ?3)))"
        " AND (?4 IS NULL OR account_id = ?4)"
        " ORDER BY keys.id <> ?1, revoked_at IS NOT NULL, keys.id LIMIT 21",
        (text, text[:_SHOWN_CHARACTERS] if text.startswith(PREFIX) else "", last, account_id),
    )
    # The text may be a secret: that is not repeated whole.
    label = text[:_SHOWN_CHARACTERS] if text.startswith(PREFIX) else text[:_MAX_TEXT_CHARACTERS]
    if not rows:
        raise RowNotFound(f"No key is called {label}: 'pinaivu keys ls' lists them.")
    matches = [row for row in rows if row["id"] == text or row["revoked_at"] is None] or rows
    if len(matches) > 1 and matches[0]["id"] != text:
        names = ", ".join(row["id"] for row in matches[:3])
        raise RowNotFound(f"{label} fits several keys ({names}, ...): say which by its id.")
    return _key(matches[0])


async def edit(
    database: Database,
    key: Key,
    by: Actor,
    *,
    name: str | UnsetType = UNSET,
    policy: Policy | UnsetType = UNSET,
    expires_at: int | UnsetType | None = UNSET,
    blocked: str | UnsetType | None = UNSET,
) -> Key:
    """Change what is given, from the next request on.  `policy` is derived from the key's.

    Raises InvalidValue, RowConflict.
    """
    values = {"name": name, "policy": policy, "expires_at": expires_at, "blocked": blocked}
    changes: dict[str, Any] = {
        field: new for field, new in values.items() if new not in (UNSET, getattr(key, field))
    }
    if not changes:
        return key
    for field in ("name", "blocked"):
        _check_text(field, changes.get(field))
    if "policy" in changes:
        _check(changes["policy"], await accounts.find(database, key.account_id), key.policy)
    stored = {
        field: msgspec.json.encode(new).decode() if isinstance(new, Policy) else new
        for field, new in changes.items()
    }
    before = {field: getattr(key, field) for field in changes}
    assignments = ", ".join(f"{field} = ?" for field in stored)
    # Of two concurrent changes of the settings, the second fails.
    old = msgspec.json.encode(key.policy).decode() if "policy" in changes else None
    (changed, _) = await database.write(
        (
            f"UPDATE keys SET {assignments} WHERE id = ? AND policy = coalesce(?, policy)",
            (*stored.values(), key.id, old),
        ),
        record(by, "key.edit", key.id, before=_for_audit(before), after=_for_audit(changes)),
    )
    if not changed:
        raise RowConflict(
            f"The settings of {key.id} have changed meanwhile, or were written by a newer version: "
            "look at them, and try again."
        )
    return msgspec.structs.replace(key, **changes)


def parse_overlap(text: str) -> float:
    """The seconds that a replaced secret stays valid.  Raises ValueError."""
    seconds = parse_span(text)
    if not 0 <= seconds <= LONGEST_LIFE:
        raise ValueError("it must be from 0 to 36500d")
    return seconds


async def rotate(database: Database, key: Key, overlap: float, by: Actor) -> tuple[Key, str]:
    """Give a key a new secret; the present one stays valid for `overlap` seconds, one from before
    that no longer.

    Raises RowConflict if the key is revoked or expired, or an account's pages key.
    """
    now = now_ms()
    if not key.prefix:
        raise RowConflict(f"{key.id} has no secret: it is what the pages of {key.account} use.")
    if key.revoked_at is not None or key.expired(now):
        raise RowConflict(f"{key.id} is {key.state(now)}: a new secret would not work either.")
    secret = generate()
    shown = (secret[:_SHOWN_CHARACTERS], secret[-4:])
    until = now + round(overlap * 1000)
    (changed, _) = await database.write(
        (
            "UPDATE keys SET old_hash = hash, old_until = ?, hash = ?, prefix = ?, last_four = ?,"
            " transcript_key = ? WHERE id = ? AND revoked_at IS NULL",
            (until, hash_of(secret), *shown, public_half(secret), key.id),
        ),
        record(by, "key.rotate", key.id, old_until=time_text(until)),
    )
    if not changed:
        raise RowConflict(f"{key.id} has just been revoked: a new secret would not work either.")
    prefix, last_four = shown
    rotated = msgspec.structs.replace(
        key,
        prefix=prefix,
        last_four=last_four,
        old_until=until,
        transcript_key=public_half(secret),
    )
    return rotated, secret


async def revoke(database: Database, key: Key, by: Actor) -> Key:
    """Revoke a key: no request that comes after the commit is served.

    Raises RowConflict for an account's pages key.
    """
    if not key.prefix:
        raise RowConflict(
            f"{key.id} is what the pages of {key.account} use, and is not revoked: block it, or "
            "remove the account."
        )
    now = now_ms()
    await database.write(
        ("UPDATE keys SET revoked_at = ? WHERE id = ? AND revoked_at IS NULL", (now, key.id)),
        record(by, "key.revoke", key.id),
    )
    return msgspec.structs.replace(key, revoked_at=key.revoked_at or now)


def charge(key_id: str, *, tokens: int, amount: int, at: int, period: int) -> SqlStatement:
    """The statement that adds a request to the key's counters, for the transaction of its receipt.

    `at` is when it came, `period` when the period of the budget began in which it came, both Unix
    milliseconds.  What was spent in the period charged before is kept (schema.sql), in case the
    clock goes back to it.
    """
    return (
        "UPDATE keys SET requests = requests + 1, tokens = tokens + ?1, amount = amount + ?2,"
        # Not the latest ever: the clock may have been ahead.
        " last_used_at = iif(last_used_at BETWEEN ?3 AND ?6, last_used_at, ?3),"
        " spent = ?2 + iif(?4 = spent_since, spent, coalesce("
        "  (SELECT spent FROM spent_before WHERE key_id = ?5 AND since = ?4), 0)),"
        " spent_since = ?4 WHERE id = ?5",
        (tokens, amount, at, period, key_id, now_ms()),
    )


def in_period(since: int, begin: int, end: int | None) -> bool:
    """Whether the period that began at `since` is the one from `begin` to `end`."""
    return begin <= since and (end is None or since < end)


def _check_text(field: str, text: str | None) -> None:
    """Names are printed in lists and sentences.  Raises InvalidValue."""
    if text is not None and (len(text) > _MAX_TEXT_CHARACTERS or not text.isprintable()):
        raise InvalidValue(
            f"it must be at most {_MAX_TEXT_CHARACTERS} printable characters, in one line",
            field=field,
        )


def _check(policy: Policy, account: Account | None = None, before: Policy | None = None) -> None:
    try:
        policies.check(policy)
        if policy.budget is not None and (before is None or policy.budget != before.budget):
            policies.check_new(policy.budget)
    except ValueError as error:
        raise InvalidValue(str(error), field="policy") from error
    if "admin" in policy.scopes and account is not None and account.role != "admin":
        raise InvalidValue(
            f"{account.name} is a member: only the keys of an admin's account may have the scope "
            "'admin'",
            field="policy.scopes",
        )


def _for_audit(changes: dict[str, Any]) -> dict[str, Any]:
    times = {"expires_at": time_text(changes["expires_at"])} if "expires_at" in changes else {}
    return {**changes, **times}
