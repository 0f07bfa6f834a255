"""`pinaivu keys`: works on the home's database, whether or not a server is running on it."""

from __future__ import annotations

from operator import attrgetter
from pathlib import Path
from typing import Any

import click
from msgspec import UNSET, to_builtins

from pinaivu_box.cli import suggestions
from pinaivu_box.cli.call import Call, actor
from pinaivu_box.cli.client import path_of, request
from pinaivu_box.cli.group import Group
from pinaivu_box.cli.key_options import add_policy_options, expiry, with_options
from pinaivu_box.cli.options import NONE, all_option, standard_options
from pinaivu_box.cli.render import Column, print_fields, print_json, time_text
from pinaivu_box.errors import CliError, InvalidValue, NotRunning, RowNotFound, UsageError
from pinaivu_box.policy import ADMIN_SCOPES, Policy

_PATH = "/v1/admin/keys"


def _limits(key: Any) -> str:
    """The limits of a key, in brief."""
    policy = key.policy
    values = (policy.rpm, policy.tpm, policy.max_parallel)
    names = ("rpm", "tpm", "parallel")
    limits = [f"{n} {name}" for n, name in zip(values, names, strict=True) if n is not None]
    if policy.budget is not None:
        period = f" per {policy.budget.period}" if policy.budget.period else ""
        limits.append(f"{key.spent} of {policy.budget.amount}{period}")
    limits += ["models"] * bool(policy.models) + ["networks"] * bool(policy.networks)
    return ", ".join(limits)


# A key can also be named by its beginning, which is shown: its id is the first to be left out.
_COLUMNS = (
    Column("ID", attrgetter("id"), drop=1),
    Column("NAME", lambda key: key.name + (" (admin)" if key.admin else "")),
    Column("ACCOUNT", attrgetter("account"), drop=6),
    Column("KEY", lambda key: f"{key.prefix}…{key.last_four}" if key.prefix else "-"),
    Column("STATE", attrgetter("state")),
    Column("EXPIRES", lambda key: time_text(key.expires_at, "never")),
    Column("LIMITS", _limits, drop=5),
    Column("REQUESTS", lambda key: str(key.requests), number=True, drop=4),
    Column("TOKENS", lambda key: str(key.tokens), number=True, drop=3),
    Column("LAST USED", lambda key: time_text(key.last_used_at, "never"), drop=2),
)


@click.group(cls=Group)
def keys() -> None:
    """Create, list, change, rotate and revoke API keys.

    KEY is the name or the id of a key, or how the key begins.  Changes apply from the next request
    on, whether or not a server is running.
    """


@add_policy_options
@keys.command()
@standard_options(config=True)
@click.option("--name", default="", help="What the key is for.")
@click.option("--account", metavar="NAME", help="Account of the key.  [default: a new account]")
@click.option("--create-account", is_flag=True, help="Create the account if it does not exist.")
@click.option("--admin", is_flag=True, help="Grant all scopes; the default account is 'owner'.")
@click.option("--expires", metavar="DURATION", help="For example 12h or 30d.  [default: never]")
@click.option(
    "--from",
    "source",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Create a key for each line of a CSV file ('-': standard input).",
)
def create(
    call: Call,
    name: str,
    account: str | None,
    create_account: bool,
    admin: bool,
    expires: str | None,
    source: Path | None,
    **settings: Any,
) -> None:
    """Create a key and print it.  It is shown only this once.

    The first line of a CSV file names its columns: name, account, expires, and settings under the
    names of their options (rpm, tpm, max_parallel, budget, model, ...), or all settings in one
    column limits ("rpm=60; budget=10 per 30d").  The options stand for empty cells.  Either all
    keys are created or none; they are printed as CSV.
    """
    from pinaivu_box.cli.key_files import drafts, print_csv
    from pinaivu_box.store.new_keys import Draft

    if admin and settings["scopes"]:
        raise UsageError("--admin grants all scopes: remove --admin or --scope.")
    if source is not None and name:
        raise UsageError("--from takes the names from the file: remove --name.")
    if create_account and account is None and source is None:
        raise UsageError("--create-account needs --account, which names the account.")
    policy = with_options(Policy(scopes=ADMIN_SCOPES) if admin else Policy(), settings)
    if source is None:
        numbered = [(0, Draft(name, account, policy, expiry(expires)))]
    else:
        numbered = list(drafts(source, policy, account, expires))
    created = _create(call, source, numbered, create_account)
    if source is None:
        (key,) = created
        owner = f"{key.id} of account {key.account}"
        _print_secret(call, key, f"{owner}: store the key now, it is not shown again.")
    else:
        call.print(created, print_csv)
        click.echo(f"{len(created)} keys: store them now, they are not shown again.", err=True)
    _warn(call, *(draft.policy for _, draft in numbered))


def _create(
    call: Call, source: Path | None, numbered: list[tuple[int, Any]], create_account: bool
) -> list[Any]:
    """Create the keys of numbered lines, all or none.  Errors name the line of a file."""
    from pinaivu_box.admin.views import new_key_view
    from pinaivu_box.cli.key_files import at_line
    from pinaivu_box.store.new_keys import NewKeys

    async def work(database: Any) -> list[Any]:
        batch = NewKeys(database, actor(), new_accounts=create_account)
        for line, draft in numbered:
            try:
                await batch.add(draft)
            except (InvalidValue, RowNotFound) as error:
                if source is None:
                    raise
                raise at_line(source, line, _reason(error, create_account)) from error
        return [new_key_view(key, secret) for key, secret in await batch.write()]

    return call.in_database(work)


def _reason(error: InvalidValue | RowNotFound, create_account: bool) -> str:
    """Why the key of a line cannot be created."""
    if isinstance(error, InvalidValue):
        return f"{error.field.rpartition('.')[2]}: {error.message}"
    return error.message + ("" if create_account else " --create-account creates it.")


@keys.command()
@standard_options(wide=True)
@click.option("--account", metavar="NAME", help="Only the keys of this account.")
@all_option("List all keys, not only the newest 100.")
def ls(call: Call, account: str | None, limit: int) -> None:
    """List the keys, newest last, without their secrets."""
    from pinaivu_box.admin.lists import list_keys

    page = call.in_database(lambda database: list_keys(database, account=account, limit=limit))
    call.print_list(page.data[::-1], _COLUMNS)
    if page.has_more:
        click.echo("There are older keys: --all lists them too.", err=True)


@keys.command()
@standard_options()
@click.argument("key", shell_complete=suggestions.keys)
def show(call: Call, key: str) -> None:
    """Show a key and all its settings, without its secret."""
    from pinaivu_box.store import keys

    _print_key(call, call.in_database(lambda database: keys.named(database, key)))


@add_policy_options
@keys.command()
@standard_options(config=True)
@click.argument("key", shell_complete=suggestions.keys)
@click.option("--name", help="What the key is for.")
@click.option("--expires", metavar="DURATION", help="New lifetime from now, for example 30d.")
@click.option("--block", metavar="REASON", help="Refuse its requests until --unblock.")
@click.option("--unblock", is_flag=True, help="Serve its requests again.")
@click.option("--now", is_flag=True, help="With --block: stop its running requests too.")
def edit(
    call: Call,
    key: str,
    name: str | None,
    expires: str | None,
    block: str | None,
    unblock: bool,
    now: bool,
    **settings: Any,
) -> None:
    """Change settings of a key.

    The value 'none' resets a setting to its default: --rpm none removes the limit, --model none
    allows all models, --expires none means never.  Repeatable options replace the whole list.
    """
    from pinaivu_box.store import keys

    if block is not None and (unblock or not block.strip()):
        raise UsageError("--block needs a reason and cannot be used with --unblock.")
    if now and block is None:
        raise UsageError("--now needs --block (or use 'keys revoke --now').")
    changes: dict[str, Any] = {} if expires is None else {"expires_at": expiry(expires)}

    async def work(database: Any) -> keys.Key:
        stored = await keys.named(database, key)
        return await keys.edit(
            database,
            stored,
            actor(),
            name=UNSET if name is None else name,
            policy=with_options(stored.policy, settings),
            blocked=None if unblock else UNSET if block is None else block,
            **changes,
        )

    edited = call.in_database(work)
    if now:
        _stop(call, "PATCH", f"{path_of(_PATH, edited.id)}?now=true", {"blocked": block})
    _print_key(call, edited)
    _warn(call, edited.policy)


@keys.command()
@standard_options()
@click.argument("key", shell_complete=suggestions.keys)
@click.option(
    "--overlap",
    metavar="DURATION",
    help="How long the current secret keeps working (default 24h; 0 revokes it now).",
)
def rotate(call: Call, key: str, overlap: str | None) -> None:
    """Give a key a new secret and print it.  It is shown only this once.

    Settings, limits and usage stay.  If the overlap of an earlier rotation has not ended, the
    secret from before that rotation stops working now.
    """
    from pinaivu_box.admin.views import new_key_view
    from pinaivu_box.store import keys

    try:
        seconds = keys.parse_overlap(keys.OVERLAP if overlap is None else overlap)
    except ValueError as error:
        raise UsageError(f"--overlap: {error}.") from error

    async def work(database: Any) -> tuple[keys.Key, str]:
        return await keys.rotate(database, await keys.named(database, key), seconds, actor())

    rotated = new_key_view(*call.in_database(work))
    state = f"works until {rotated.old_until}" if seconds else "no longer works"
    text = f"{rotated.id}: store the new key now, it is not shown again; the old one {state}."
    _print_secret(call, rotated, text)


@keys.command()
@standard_options()
@click.argument("key", shell_complete=suggestions.keys)
@click.option("--now", is_flag=True, help="Stop its running requests too.")
def revoke(call: Call, key: str, now: bool) -> None:
    """Revoke a key permanently."""
    from pinaivu_box.store import keys

    async def work(database: Any) -> keys.Key:
        return await keys.revoke(database, await keys.named(database, key), actor())

    revoked = call.in_database(work)
    click.echo(f"{revoked.id} is revoked.", err=True)
    if now:
        _stop(call, "POST", f"{path_of(_PATH, revoked.id)}/revoke?now=true")
    if call.as_json:
        _print_key(call, revoked)


def _warn(call: Call, *policies: Policy) -> None:
    from pinaivu_box.admin.views import warning

    try:
        config = call.config()
    except CliError:  # the server will not start with this file either, and says why
        return
    for text in {text for policy in policies if (text := warning(policy, config))}:
        click.echo(f"warning: {text}", err=True)


def _stop(call: Call, method: str, path: str, body: Any = None) -> None:
    """Ask the running server for a change that is in the database already, and to stop requests."""
    try:
        stopped = request(call.home, path, method=method, body=body)["stopped"]
    except NotRunning:
        click.echo("No box is running here, so no request was stopped.", err=True)
    else:
        click.echo(f"{stopped} running requests were stopped.", err=True)


def _print_secret(call: Call, key: Any, text: str) -> None:
    """Print a new key (`NewKey`): without --json its secret alone on standard output."""
    if call.as_json:
        print_json(key)
    else:
        click.echo(key.key)
        click.echo(text, err=True)


def _print_key(call: Call, key: Any) -> None:
    from pinaivu_box.admin.views import key_view

    call.print(key_view(key), _print_fields)


def _print_fields(view: Any) -> None:
    fields: dict[str, Any] = to_builtins(view)
    fields |= fields.pop("policy")
    print_fields({name: _value(value) for name, value in fields.items()})


def _value(value: Any) -> str:
    text = ", ".join(value) if isinstance(value, tuple | list) else value
    return NONE if text in (None, "", {}) else str(text)
