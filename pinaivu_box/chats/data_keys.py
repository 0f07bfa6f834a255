"""The data keys of accounts: made at the first login, opened by what wraps them, wrapped anew.

Whoever logs in with a password calls `at_login`; whoever changes a password that is known adds
`rewrapped` to the same transaction.  A password that is replaced without the old one leaves the
key wrapped by the old one, which is then called `former`: that or the recovery key opens it.
"""

from __future__ import annotations

from functools import partial

import msgspec

from pinaivu_box.chats import sealing
from pinaivu_box.openai.memories import Sealed
from pinaivu_box.store import account_secrets, accounts
from pinaivu_box.store.account_secrets import (
    FORMER,
    NONE,
    PASSPHRASE,
    PASSWORD,
    RECOVERY,
    AccountSecret,
)
from pinaivu_box.store.database import Database, SqlStatement
from pinaivu_box.store.times import now_ms

WRAPPINGS = (PASSWORD, FORMER, PASSPHRASE, NONE)  # of which an account has one


class DataKeyState(msgspec.Struct, frozen=True):
    """`sealed` is None before the account's first login.  `lost`: by a password that was replaced
    by somebody who did not know it."""

    sealed: Sealed | None
    recovery_key: bool
    lost: bool


async def state_of(database: Database, account_id: str) -> DataKeyState:
    kinds = await account_secrets.of(database, account_id)
    sealed: Sealed | None = None
    if PASSWORD in kinds or FORMER in kinds:
        sealed = "password"
    elif PASSPHRASE in kinds:
        sealed = "passphrase"
    elif NONE in kinds:
        sealed = "none"
    return DataKeyState(sealed, RECOVERY in kinds, lost=FORMER in kinds)


async def at_login(database: Database, account_id: str, password: str) -> bytes | None:
    """The data key of an account whose password was checked.  It is made if there is none.  None if
    the password does not open it: it has a passphrase, or the password was reset."""
    secrets = await account_secrets.of(database, account_id)
    if not secrets:
        data_key = sealing.new_data_key()
        secret = await _wrapped(account_id, PASSWORD, password, data_key)
        (made,) = await database.write(account_secrets.put_first(secret))
        if made:
            return data_key
        secrets = await account_secrets.of(database, account_id)
    if NONE in secrets:
        return secrets[NONE].wrapped
    return await _opened(secrets.get(PASSWORD), password)


async def unsealed(database: Database, account_id: str) -> bytes | None:
    """The data key if the account has left its chats unsealed."""
    secret = (await account_secrets.of(database, account_id)).get(NONE)
    return None if secret is None else secret.wrapped


async def unlock(database: Database, account_id: str, secret: str) -> bytes | None:
    """The data key, if `secret` is the password, the passphrase or the recovery key."""
    secrets = await account_secrets.of(database, account_id)
    if NONE in secrets:
        return secrets[NONE].wrapped
    return await _opened_by_any(secrets, secret)


async def opens(database: Database, account_id: str, secret: str) -> bool:
    """Whether `secret` is the password, the passphrase or the recovery key."""
    secrets = await account_secrets.of(database, account_id)
    return await _opened_by_any(secrets, secret) is not None


async def _opened_by_any(secrets: dict[str, AccountSecret], secret: str) -> bytes | None:
    for kind in (RECOVERY, PASSPHRASE, PASSWORD, FORMER):  # the first is cheap to try
        if (data_key := await _opened(secrets.get(kind), secret)) is not None:
            return data_key
    return None


async def seal(
    database: Database, account_id: str, how: Sealed, secret: str, data_key: bytes | None
) -> bytes | None:
    """Wrap the data key so from now on, and no longer otherwise; a recovery key stays.

    Without a `data_key` one is made if the account has none yet; None if it has one.
    """
    if data_key is None:
        data_key = sealing.new_data_key()
        put = account_secrets.put_first(await _wrapped(account_id, how, secret, data_key))
        (made,) = await database.write(put)
        return data_key if made else None
    await database.write(
        account_secrets.without_kinds(account_id, *(kind for kind in WRAPPINGS if kind != how)),
        account_secrets.put(await _wrapped(account_id, how, secret, data_key)),
    )
    return data_key


async def rewrapped(account_id: str, data_key: bytes, password: str) -> SqlStatement:
    """The statement that wraps it by a new password, for the transaction that sets that."""
    return account_secrets.put(await _wrapped(account_id, PASSWORD, password, data_key))


async def new_recovery_key(database: Database, account_id: str, data_key: bytes) -> str:
    """Another recovery key; an earlier one opens nothing any more.  It is stored nowhere."""
    recovery_key = sealing.new_recovery_key()
    secret = await _wrapped(account_id, RECOVERY, recovery_key, data_key)
    await database.write(account_secrets.put(secret))
    return recovery_key


async def _wrapped(account_id: str, kind: str, secret: str, data_key: bytes) -> AccountSecret:
    salt = sealing.new_salt()
    limits = (sealing.OPS_LIMIT, sealing.MEM_LIMIT)
    if kind == NONE:
        return AccountSecret(account_id, kind, b"", 0, 0, data_key, now_ms())
    if kind == RECOVERY:
        limits = (0, 0)
    wrapping = await _wrapping_key(account_id, kind, secret, salt, *limits)
    wrapped = sealing.wrap(data_key, wrapping, account_id, kind)
    return AccountSecret(account_id, kind, salt, *limits, wrapped, now_ms())


async def _opened(stored: AccountSecret | None, secret: str) -> bytes | None:
    if stored is None:
        return None
    wrapping = await _wrapping_key(
        stored.account_id,
        stored.kind,
        secret,
        stored.salt,
        stored.ops_limit,
        stored.mem_limit,
    )
    wrapped_as = PASSWORD if stored.kind == FORMER else stored.kind
    return sealing.unwrap(stored.wrapped, wrapping, stored.account_id, wrapped_as)


async def _wrapping_key(
    account_id: str, kind: str, secret: str, salt: bytes, ops_limit: int, mem_limit: int
) -> bytes:
    if kind == RECOVERY:
        return sealing.recovery_wrapping_key(secret, salt)
    derive = partial(sealing.wrapping_key, secret, salt, ops_limit, mem_limit)
    return await accounts.in_hasher(derive, account_id)
