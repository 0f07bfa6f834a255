"""`pinaivu accounts`."""

from __future__ import annotations

import sys
from operator import attrgetter
from typing import Any

import click

from pinaivu_box.cli import suggestions
from pinaivu_box.cli.call import Call, actor
from pinaivu_box.cli.group import Group
from pinaivu_box.cli.options import all_option, standard_options
from pinaivu_box.cli.render import Column
from pinaivu_box.errors import CliError, UsageError

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
@click.argument("name", shell_complete=suggestions.accounts)
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
    call.report(f"{changed.name} has a new password.", account_view(changed))


@accounts.command()
@standard_options()
@click.argument("name", shell_complete=suggestions.accounts)
def rm(call: Call, name: str) -> None:
    """Remove an account and revoke its keys; its usage stays on record."""
    from pinaivu_box.store import accounts

    async def work(database: Any) -> accounts.Account:
        account = await accounts.find(database, name)
        await accounts.remove(database, account, actor())
        return account

    removed = call.in_database(work)
    call.report(
        f"{removed.name} was removed, and its {removed.keys} keys were revoked.",
        {"id": removed.id, "name": removed.name, "deleted": True},
    )


@accounts.command("link-oidc")
@standard_options(config=True)
@click.argument("name", shell_complete=suggestions.accounts)
@click.argument("subject")
def link_oidc(call: Call, name: str, subject: str) -> None:
    """Let a person log in to an account by single sign-on.

    SUBJECT is what the provider of [login.oidc] calls the person ("sub").  If the person has logged
    in here before, 'pinaivu audit' shows it; the account of that time is no longer theirs.
    """
    from pinaivu_box.store import account_identities, accounts

    issuer = call.config().login.oidc.issuer
    if not issuer:
        raise UsageError("There is no single sign-on: [login.oidc] has no issuer.")

    async def work(database: Any) -> accounts.Account:
        account = await accounts.find(database, name)
        await account_identities.link(database, issuer, subject, account, actor())
        return account

    linked = call.in_database(work)
    call.report(
        f"{subject} of {issuer} logs in to {linked.name} from now on.",
        {"account": linked.name, "issuer": issuer, "subject": subject},
    )


@accounts.command("unlink-oidc")
@standard_options()
@click.argument("name", shell_complete=suggestions.accounts)
def unlink_oidc(call: Call, name: str) -> None:
    """Let nobody log in to an account by single sign-on, and end its sessions."""
    from pinaivu_box.store import account_identities, accounts

    async def work(database: Any) -> tuple[accounts.Account, int]:
        account = await accounts.find(database, name)
        return account, await account_identities.unlink(database, account, actor())

    account, removed = call.in_database(work)
    if not removed:
        raise CliError(f"Nobody logs in to {account.name} by single sign-on.")
    call.report(
        f"Nobody logs in to {account.name} by single sign-on any more.",
        {"account": account.name, "unlinked": removed},
    )


@accounts.command()
@standard_options()
@click.argument("name", shell_complete=suggestions.accounts)
@click.option("--yes", is_flag=True, help="Do not ask.")
def erase(call: Call, name: str, yes: bool) -> None:
    """Erase an account: its chats, memories, responses, transcripts and sessions.

    They cannot be had back: export them first.  Its usage, receipts and the audit trail stay,
    without its name and those of its keys, which are revoked.  A removed account can be erased too.
    """
    from pinaivu_box.gateway.saved_prefixes import delete_all
    from pinaivu_box.store import accounts, erasure

    account = call.in_database(lambda database: accounts.find_removed(database, name))
    if not yes:
        if not sys.stdin.isatty():
            raise UsageError("There is no terminal to ask whether you are sure: use --yes.")
        click.confirm(f"Erase {account.name} for good?", abort=True, err=True)
    erased = call.in_database(lambda database: erasure.erase(database, account, actor()))
    delete_all(call.home)
    call.report(
        f"{account.name} was erased: {erased.conversations} conversations, {erased.memories} "
        f"memories, {erased.responses} responses and {erased.transcripts} transcripts.",
        {"id": account.id, "erased": True},
    )


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


@accounts.command()
@standard_options(config=True)
@click.argument("name", shell_complete=suggestions.accounts)
def link(call: Call, name: str) -> None:
    """Make a one-time link that sets the password of an account.

    It works once, for 15 minutes, and also where the server does not run yet.
    """
    from pinaivu_box.store import accounts, login_links

    base = _page_address(call)

    async def work(database: Any) -> tuple[str, str, int]:
        account = await accounts.find(database, name)
        made, token = await login_links.create(database, account, actor())
        return account.name, token, made.expires_at

    owner, token, expires_at = call.in_database(work)
    _print_link(call, f"{base}/login/link/{token}", owner, expires_at)


@accounts.command()
@standard_options(config=True)
def invite(call: Call) -> None:
    """Make an invitation to sign up, which works once, for a week."""
    from pinaivu_box.store import login_links

    if call.config().login.signup == "closed":
        raise CliError("Nobody can sign up: set signup = 'invite' under [login] in config.toml.")
    base = _page_address(call)
    made, token = call.in_database(lambda database: login_links.invite(database, actor()))
    _print_link(call, f"{base}/signup?invitation={token}", None, made.expires_at)


def _print_link(call: Call, url: str, account: str | None, expires_at: int) -> None:
    from pinaivu_box.store.times import time_text

    view = {"url": url, "account": account, "expires_at": time_text(expires_at)}
    call.print(view, lambda shown: click.echo(shown["url"]))


def _page_address(call: Call) -> str:
    """Where browsers find the pages of this home's box, running or not."""
    from pinaivu_box.cli.addresses import login_url
    from pinaivu_box.cli.client import running_on

    server = call.config().server
    running = running_on(call.home)
    port = server.port if running is None else int(running.url.rpartition(":")[2])
    return login_url(server, port)
