"""`pinaivu accounts`: whose keys are whose."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from pinaivu_box.cli.group import Group
from pinaivu_box.cli.home import (
    actor,
    home_option,
    json_option,
    print_json,
    with_database,
)
from pinaivu_box.cli.tables import print_table, wide_option
from pinaivu_box.errors import UsageError

_ALL = 2**62

stdin_option = click.option(
    "--password-stdin", is_flag=True, help="Read it from standard input, one line."
)


@click.group(cls=Group)
def accounts() -> None:
    """Create, list and remove accounts.

    Keys of one account see each other's receipts and usage.  'keys create' without --account makes
    an account for the key.
    """


@accounts.command()
@home_option
@json_option
@click.argument("name")
@click.option(
    "--role",
    type=click.Choice(["admin", "member"]),
    default="member",
    help="An admin's keys may have the scope 'admin'; member if not set.",
)
@click.option("--password", is_flag=True, help="Ask for a password; it has none if not set.")
@stdin_option
def create(
    home: Path, as_json: bool, name: str, role: Any, password: bool, password_stdin: bool
) -> None:
    """Create an account."""
    from pinaivu_box.store import accounts as store

    given = _password(password_stdin) if password or password_stdin else None

    async def work(database: Any) -> store.Account:
        return await store.create(database, name, role, given, actor())

    made = with_database(home, work)
    if as_json:
        _print(made)
    else:
        click.echo(made.id)


@accounts.command()
@home_option
@json_option
@wide_option
@click.option("--all", "all_", is_flag=True, help="All of them, not only the first 100 by name.")
def ls(home: Path, as_json: bool, wide: bool, all_: bool) -> None:
    """List the accounts."""
    from pinaivu_box.store import accounts as store
    from pinaivu_box.store.views import account_view

    async def work(database: Any) -> list[store.Account]:
        return await store.ls(database, limit=_ALL if all_ else 101)

    found = with_database(home, work)
    more = not all_ and len(found) > 100
    shown = [account_view(one) for one in found[: 100 if more else None]]
    if as_json:
        print_json(shown)
    else:
        rows = [
            (one.id, one.name, one.role, "yes" if one.has_password else "no", str(one.keys))
            for one in shown
        ]
        print_table(
            ("ID", "NAME", "ROLE", "PASSWORD", "KEYS"),
            rows,
            numbers=("KEYS",),
            spared=("ID", "PASSWORD", "KEYS"),
            wide=wide,
        )
    if more:
        click.echo("There are more accounts: --all lists them too.", err=True)


@accounts.command()
@home_option
@json_option
@click.argument("name")
@stdin_option
def passwd(home: Path, as_json: bool, name: str, password_stdin: bool) -> None:
    """Set an account's password."""
    from pinaivu_box.store import accounts as store

    async def work(database: Any) -> store.Account:
        account = await store.find(database, name)
        given = _password(password_stdin)
        await store.set_password(database, account, given, actor())
        return await store.find(database, account.id)

    changed = with_database(home, work)
    click.echo(f"{changed.name} has a new password.", err=True)
    if as_json:
        _print(changed)


@accounts.command()
@home_option
@json_option
@click.argument("name")
def rm(home: Path, as_json: bool, name: str) -> None:
    """Remove an account and revoke its keys; what it used stays in the books."""
    from pinaivu_box.store import accounts as store

    async def work(database: Any) -> store.Account:
        account = await store.find(database, name)
        await store.remove(database, account, actor())
        return account

    removed = with_database(home, work)
    click.echo(f"{removed.name} is removed, {removed.keys} keys are revoked.", err=True)
    if as_json:
        print_json({"id": removed.id, "name": removed.name, "deleted": True})


def _print(account: Any) -> None:
    from pinaivu_box.store.views import account_view

    print_json(account_view(account))


def _password(from_stdin: bool) -> str:
    """Raises UsageError."""
    if from_stdin:
        try:
            return sys.stdin.buffer.readline().decode().rstrip("\r\n")
        except UnicodeDecodeError:
            raise UsageError("The password is not UTF-8 text.") from None
    if not sys.stdin.isatty():
        raise UsageError("There is no terminal to ask for the password: use --password-stdin.")
    password: str = click.prompt("Password", hide_input=True, confirmation_prompt=True, err=True)
    return password
