"""`pinaivu accounts`."""

from __future__ import annotations

import sys
from operator import attrgetter
from typing import Any

import click

from pinaivu_box.cli.call import Call, actor
from pinaivu_box.cli.group import Group
from pinaivu_box.cli.options import all_option, standard_options
from pinaivu_box.cli.render import Column, print_json
from pinaivu_box.errors import UsageError

_COLUMNS = (
    Column("ID", attrgetter("id"), drop=1),
    Column("NAME", attrgetter("name")),
    Column("ROLE", attrgetter("role")),
    Column("PASSWORD", lambda account: "yes" if account.has_password else "no", drop=2),
    Column("KEYS", lambda account: str(account.keys), number=True, drop=3),
)

stdin_option = click.option(
    "--password-stdin", is_flag=True, help="Read the password from standard input (one line)."
)


@click.group(cls=Group)
def accounts() -> None:
    """Create, list and remove accounts.

    The keys of an account see each other's receipts and usage.  'keys create' without --account
    creates an account for the key.
    """


@accounts.command()
@standard_options()
@click.argument("name")
@click.option(
    "--role",
    type=click.Choice(["admin", "member"]),
    default="member",
    help="Keys of an admin may have the scope 'admin'.  [default: member]",
)
@click.option("--password", is_flag=True, help="Ask for a password.  [default: no password]")
@stdin_option
def create(call: Call, name: str, role: Any, password: bool, password_stdin: bool) -> None:
    """Create an account."""
    from pinaivu_box.admin.views import account_view
    from pinaivu_box.store import accounts

    secret = _password(password_stdin) if password or password_stdin else None
    created = call.in_database(
        lambda database: accounts.create(database, name, role, secret, actor())
    )
    call.print(account_view(created), lambda account: click.echo(account.id))


@accounts.command()
@standard_options(wide=True)
@all_option("List all accounts, not only the first 100.")
def ls(call: Call, limit: int) -> None:
    """List the accounts by name."""
    from pinaivu_box.admin.lists import list_accounts

    page = call.in_database(lambda database: list_accounts(database, limit=limit))
    call.print_list(page.data, _COLUMNS)
    if page.has_more:
        click.echo("There are more accounts: --all lists them too.", err=True)


@accounts.command()
@standard_options()
@click.argument("name")
@stdin_option
def passwd(call: Call, name: str, password_stdin: bool) -> None:
    """Set the password of an account."""
    from pinaivu_box.admin.views import account_view
    from pinaivu_box.store import accounts

    account = call.in_database(lambda database: accounts.find(database, name))
    secret = _password(password_stdin)

    async def work(database: Any) -> accounts.Account:
        await accounts.set_password(database, account, secret, actor())
        return await accounts.find(database, account.id)

    changed = call.in_database(work)
    click.echo(f"{changed.name} has a new password.", err=True)
    if call.as_json:
        print_json(account_view(changed))


@accounts.command()
@standard_options()
@click.argument("name")
def rm(call: Call, name: str) -> None:
    """Remove an account and revoke its keys; its usage stays on record."""
    from pinaivu_box.store import accounts

    async def work(database: Any) -> accounts.Account:
        account = await accounts.find(database, name)
        await accounts.remove(database, account, actor())
        return account

    removed = call.in_database(work)
    click.echo(f"{removed.name} was removed, and its {removed.keys} keys were revoked.", err=True)
    if call.as_json:
        print_json({"id": removed.id, "name": removed.name, "deleted": True})


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
