"""Creates keys and the accounts that they need: all of them, or none."""

from __future__ import annotations

import sqlite3

from msgspec import Struct

from pinaivu_box.errors import InvalidValue, RowConflict, RowNotFound
from pinaivu_box.policy import Policy
from pinaivu_box.store import accounts, keys
from pinaivu_box.store.accounts import Account
from pinaivu_box.store.audit import Actor
from pinaivu_box.store.database import Database, SqlStatement
from pinaivu_box.store.keys import Key


class Draft(Struct, frozen=True):
    """A key to be created.  Without an `account` it gets one of its own, so that keys of different
    people do not see each other's receipts; with the scope `admin` it gets the owner's.
    `expires_at` in Unix milliseconds."""

    name: str
    account: str | None
    policy: Policy
    expires_at: int | None = None


class NewKeys:
    """Add each draft, then write: one transaction."""

    def __init__(self, database: Database, by: Actor, *, new_accounts: bool = False) -> None:
        """With `new_accounts`, accounts that do not exist are created, as members."""
        self._database = database
        self._by = by
        self._new_accounts = new_accounts
        self._accounts: dict[str, Account] = {}  # by the name or id in the drafts
        self._taken: set[str] = set()  # names of new accounts
        self._statements: list[SqlStatement] = []
        self._created: list[tuple[Key, str]] = []

    async def add(self, draft: Draft) -> None:
        """Raises InvalidValue, RowNotFound."""
        account = await self._account(draft)
        key, secret, *statements = keys.new(
            account, draft.name, draft.policy, draft.expires_at, self._by
        )
        self._statements += statements
        self._created.append((key, secret))

    async def write(self) -> list[tuple[Key, str]]:
        """Store the keys; returns them with their secrets, which are nowhere else.

        Raises RowConflict, and stores none, if an account was created or removed meanwhile.
        """
        try:
            await self._database.write(*self._statements)
        except sqlite3.IntegrityError as error:
            raise RowConflict(
                "An account was created or removed meanwhile, and no key was made: try again."
            ) from error
        return self._created

    async def _account(self, draft: Draft) -> Account:
        if draft.account is None and "admin" not in draft.policy.scopes:
            return await self._own(draft.name)
        name = draft.account or accounts.OWNER
        if name not in self._accounts:
            self._accounts[name] = await self._find(name)
        return self._accounts[name]

    async def _find(self, name: str) -> Account:
        try:
            return await accounts.find(self._database, name)
        except RowNotFound:
            if not self._new_accounts:
                raise
        if name in self._taken:
            raise InvalidValue(
                f"{name} is created for another of these keys: name it there too",
                field="account",
            )
        accounts.check_name(name)
        return self._create(name)

    async def _own(self, key_name: str) -> Account:
        for name in accounts.names_for_key(key_name):
            try:
                await accounts.find(self._database, name)
            except RowNotFound:
                if name not in self._taken:
                    return self._create(name)
        raise RowConflict(f"There is an account for a key {key_name} already: name one.")

    def _create(self, name: str) -> Account:
        account, *statements = accounts.new(name, "member", None, self._by)
        self._statements += statements
        self._taken.add(name)
        return account


async def create(database: Database, draft: Draft, by: Actor) -> tuple[Key, str]:
    """Store one key; returns it with its secret.  Raises as `NewKeys.add` and `write` do."""
    try:
        return await _create(database, draft, by)
    except RowConflict:  # the account that it was to get was created meanwhile: it gets another
        return await _create(database, draft, by)


async def _create(database: Database, draft: Draft, by: Actor) -> tuple[Key, str]:
    batch = NewKeys(database, by)
    await batch.add(draft)
    (created,) = await batch.write()
    return created
