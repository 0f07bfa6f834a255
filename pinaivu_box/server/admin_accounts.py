"""`/v1/admin/accounts`."""

from __future__ import annotations

from typing import Annotated

from msgspec import UNSET, Meta, Struct, UnsetType
from starlette.requests import Request
from starlette.responses import Response

from pinaivu_box.admin import accounts
from pinaivu_box.server.admin import Page, answer, body, box_of, by, query
from pinaivu_box.store.accounts import Role
from pinaivu_box.store.views import AccountView

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
    page, database = query(request, Page), box_of(request).database
    listed = await accounts.ls(database, after=page.after or "", limit=page.limit)
    return answer(request, AccountList(listed.data, listed.has_more))


async def create(request: Request) -> Response:
    given, database = await body(request, CreateAccount), box_of(request).database
    return answer(
        request,
        await accounts.create(database, given.name, given.role, given.password, by(request)),
    )


async def get(request: Request) -> Response:
    return answer(request, await accounts.get(box_of(request).database, _name(request)))


async def change(request: Request) -> Response:
    given, database = await body(request, ChangeAccount), box_of(request).database
    changed = await accounts.change(
        database, _name(request), by(request), role=given.role, password=given.password
    )
    return answer(request, changed)


async def remove(request: Request) -> Response:
    removed = await accounts.remove(box_of(request).database, _name(request), by(request))
    return answer(request, RemovedAccount(removed.id, removed.name))


def _name(request: Request) -> str:
    name: str = request.path_params["account"]
    return name
