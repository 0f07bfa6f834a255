"""Logging in to a box over HTTP, as its pages do."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from pathlib import Path

import httpx

from pinaivu_box.errors import RowConflict
from pinaivu_box.home import database_of
from pinaivu_box.store import accounts
from pinaivu_box.store.accounts import OWNER, Role
from pinaivu_box.store.audit import Actor

PASSWORD = "correct horse battery"
_TEST = Actor("test", "local")


def make_account(
    home: Path, name: str = "ada", *, role: Role = "member", password: str = PASSWORD
) -> str:
    """An account with a password, made in the database of a home whether or not a server runs on
    it; its id.  An account of that name gets the password and the role."""

    async def make() -> str:
        async with database_of(home) as database:
            try:
                account = await accounts.create(database, name, role, password, _TEST)
            except RowConflict:
                account = await accounts.find(database, name)
                await accounts.set_role(database, account, role, _TEST)
                await accounts.set_password(database, account, password, _TEST)
        return account.id

    return asyncio.run(make())


def make_owner(home: Path, password: str = PASSWORD) -> str:
    """Give the account `owner`, an admin's, a password; its id."""
    make_account(home, "owner", role="admin", password=password)
    return OWNER


@contextlib.contextmanager
def visitor(url: str) -> Iterator[httpx.Client]:
    """A browser that has not logged in."""
    with httpx.Client(base_url=url, timeout=180, trust_env=False) as client:
        yield client


@contextlib.contextmanager
def logged_in(url: str, name: str = "ada", password: str = PASSWORD) -> Iterator[httpx.Client]:
    """A browser that has logged in: it has the cookie, and sends the CSRF token."""
    with visitor(url) as client:
        log_in(client, name, password)
        yield client


def log_in(client: httpx.Client, name: str = "ada", password: str = PASSWORD) -> httpx.Response:
    answer = client.post("/v1/session", json={"name": name, "password": password})
    assert answer.status_code == 200, answer.text
    client.headers["x-csrf-token"] = answer.json()["csrf"]
    return answer
