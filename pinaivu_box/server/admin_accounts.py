"""`/v1/admin/accounts`."""

from __future__ import annotations

from typing import Annotated

from msgspec import UNSET, Meta, Struct, UnsetType
from starlette.requests import Request

from pinaivu_box.admin import accounts
from pinaivu_box.admin.views import AccountView
from pinaivu_box.server.context import actor_of, box_of
from pinaivu_box.server.paging import PageQuery
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


class AccountList(Struct, frozen=True):
    data: list[AccountView]
    has_more: bool
    object: str = "list"
    request_id: str = ""


class RemovedAccount(Struct, frozen=True):
    id: str
    name: str
    deleted: bool = True
    request_id: str = ""


async def list_accounts(request: Request, query: PageQuery) -> AccountList:
    database = box_of(request).database
    page = await accounts.ls(database, after=query.after or "", limit=query.limit)
    return AccountList(page.data, page.has_more)


async def create_account(request: Request, body: CreateAccount) -> AccountView:
    database, actor = box_of(request).database, actor_of(request)
    return await accounts.create(database, body.name, body.role, body.password, actor)


async def get_account(request: Request, account: str) -> AccountView:
    return await accounts.get(box_of(request).database, account)


async def change_account(request: Request, account: str, body: ChangeAccount) -> AccountView:
    return await accounts.change(
        box_of(request).database,
        account,
        actor_of(request),
        role=body.role,
        password=body.password,
    )


async def remove_account(request: Request, account: str) -> RemovedAccount:
    removed = await accounts.remove(box_of(request).database, account, actor_of(request))
    return RemovedAccount(removed.id, removed.name)
