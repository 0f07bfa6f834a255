"""`/v1/admin/accounts`."""

from __future__ import annotations

from typing import Annotated

from msgspec import UNSET, Meta, Struct, UnsetType
from starlette.requests import Request
from starlette.responses import Response

from pinaivu_box.server.admin import Page, answer, body, box_of, by, query
from pinaivu_box.store import accounts
from pinaivu_box.store.accounts import Account, Role
from pinaivu_box.store.views import AccountView, account_view

Password = Annotated[str, Meta(min_length=8, max_length=1024)]


class CreateAccount(Struct, frozen=True):
    """Without a password nobody can log in to it."""

    name: str
    role: Role = "member"
    password: Password | None = None


class ChangeAccount(Struct, frozen=True):
    """What is given is changed; null takes the password away."""

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


async def ls(request: Request) -> Response:
    page = query(request, Page)
    found = await accounts.ls(
        box_of(request).database, after=page.after or "", limit=page.limit + 1
    )
    data = [account_view(one) for one in found[: page.limit]]
    return answer(request, AccountList(data, len(found) > page.limit))


async def create(request: Request) -> Response:
    given = await body(request, CreateAccount)
    made = await accounts.create(
        box_of(request).database, given.name, given.role, given.password, by(request)
    )
    return answer(request, account_view(made))


async def get(request: Request) -> Response:
    return answer(request, account_view(await _named(request)))


async def change(request: Request) -> Response:
    given = await body(request, ChangeAccount)
    account, database = await _named(request), box_of(request).database
    if given.role is not UNSET:
        await accounts.set_role(database, account, given.role, by(request))
    if given.password is not UNSET:
        await accounts.set_password(database, account, given.password, by(request))
    return answer(request, account_view(await _named(request)))


async def remove(request: Request) -> Response:
    account = await _named(request)
    await accounts.remove(box_of(request).database, account, by(request))
    return answer(request, RemovedAccount(account.id, account.name))


async def _named(request: Request) -> Account:
    """Raises NotFound."""
    return await accounts.find(box_of(request).database, request.path_params["account"])
