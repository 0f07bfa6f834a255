"""Accounts as the admin API and `pinaivu accounts` manage them, by name or id."""

from __future__ import annotations

from msgspec import UNSET, UnsetType

from pinaivu_box.admin.page import Page, page_of
from pinaivu_box.admin.views import AccountView, account_view
from pinaivu_box.store import accounts
from pinaivu_box.store.accounts import Role
from pinaivu_box.store.audit import Actor
from pinaivu_box.store.database import Database


async def ls(database: Database, *, after: str = "", limit: int) -> Page[AccountView]:
    """The accounts by name, from the one after the name `after`."""
    stored = await accounts.ls(database, after=after, limit=limit + 1)
    return page_of(stored, limit, account_view)


async def get(database: Database, name: str) -> AccountView:
    """Raises RowNotFound."""
    return account_view(await accounts.find(database, name))


async def create(
    database: Database, name: str, role: Role, password: str | None, by: Actor
) -> AccountView:
    """Raises what `store.accounts.create` raises."""
    return account_view(await accounts.create(database, name, role, password, by))


async def change(
    database: Database,
    name: str,
    by: Actor,
    *,
    role: Role | UnsetType = UNSET,
    password: str | UnsetType | None = UNSET,
) -> AccountView:
    """Change what is given; without a password nobody can log in.

    Raises RowNotFound, and what `store.accounts.set_role` and `set_password` raise.
    """
    account = await accounts.find(database, name)
    if role is not UNSET:
        await accounts.set_role(database, account, role, by)
    if password is not UNSET:
        await accounts.set_password(database, account, password, by)
    return await get(database, account.id)


async def remove(database: Database, name: str, by: Actor) -> AccountView:
    """Remove an account and revoke its keys; returns the account as it was.

    Raises RowNotFound, and what `store.accounts.remove` raises.
    """
    account = await accounts.find(database, name)
    await accounts.remove(database, account, by)
    return account_view(account)
