"""`/v1/admin/accounts`."""

from __future__ import annotations

from typing import Annotated

from msgspec import UNSET, Meta, Struct, UnsetType
from starlette.requests import Request

from pinaivu_box.admin import lists
from pinaivu_box.admin.lists import AccountList
from pinaivu_box.admin.views import AccountView, account_view
from pinaivu_box.server.context import actor_of, box_of
from pinaivu_box.server.logins import forget_ended
from pinaivu_box.server.paging import PageQuery
from pinaivu_box.store import accounts
from pinaivu_box.store.accounts import Role

Password = Annotated[str, Meta(min_length=8, max_length=1024)]


class CreateAccount(Struct, frozen=True):
    """Nobody can log in to an account without a password."""

    name: str
    role: Role = "member"
    password: Password | None = None


class ChangeAccount(Struct, frozen=True):
    """Only the fields that are present are changed; null removes the password."""

    role: Role | UnsetType = UNSET
    password: Password | UnsetType | None = UNSET


class RemovedAccount(Struct, frozen=True):
    id: str
    name: str
    deleted: bool = True
    request_id: str = ""


async def list_accounts(request: Request, query: PageQuery) -> AccountList:
    database = box_of(request).database
    return await lists.list_accounts(database, after=query.after or "", limit=query.limit)


async def create_account(request: Request, body: CreateAccount) -> AccountView:
    database, actor = box_of(request).database, actor_of(request)
    account = await accounts.create(database, body.name, body.role, body.password, actor)
    return account_view(account)


async def get_account(request: Request, account: str) -> AccountView:
    return account_view(await accounts.find(box_of(request).database, account))


async def change_account(request: Request, account: str, body: ChangeAccount) -> AccountView:
    database, actor = box_of(request).database, actor_of(request)
    stored = await accounts.find(database, account)
    if body.role is not UNSET:
        await accounts.set_role(database, stored, body.role, actor)
    if body.password is not UNSET:
        await accounts.set_password(database, stored, body.password, actor)
        await forget_ended(box_of(request))
    return account_view(await accounts.find(database, stored.id))


async def remove_account(request: Request, account: str) -> RemovedAccount:
    database = box_of(request).database
    removed = await accounts.find(database, account)
    await accounts.remove(database, removed, actor_of(request))
    await forget_ended(box_of(request))
    return RemovedAccount(removed.id, removed.name)
