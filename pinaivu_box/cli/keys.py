"""`pinaivu keys`: on the home's database, whether a server runs on it or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from pinaivu_box.cli.group import Group
from pinaivu_box.cli.home import (
    actor,
    ask_running,
    config_option,
    home_option,
    json_option,
    load_config,
    print_json,
    short_time,
    with_database,
)
from pinaivu_box.cli.key_options import NONE, expiry, policy_options, with_options
from pinaivu_box.cli.tables import print_table, wide_option
from pinaivu_box.config import parse_span
from pinaivu_box.errors import ApiError, CliError, InvalidBody, NotFound, NotRunning, UsageError
from pinaivu_box.policy import LONGEST_LIFE, SCOPES, UNPRICED, Policy, free_of_charge

_ALL = 2**62
_COLUMNS = (
    "ID", "NAME", "ACCOUNT", "KEY", "STATE", "EXPIRES", "LIMITS", "REQUESTS", "TOKENS", "LAST USED"
)  # fmt: skip
# What a narrower terminal does not show, the first of them first; a key is also named by what is
# shown of its secret.
_SPARED = ("ID", "LAST USED", "TOKENS", "REQUESTS", "LIMITS", "ACCOUNT")


@click.group(cls=Group)
def keys() -> None:
    """Create, list, change, rotate and revoke API keys.

    A KEY is named by its name, its id or the beginning of the key.  Changes hold for the next
    request, whether a server is running or not.
    """


@keys.command()
@home_option
@config_option
@json_option
@click.option("--name", default="", help="What the key is for.")
@click.option("--account", metavar="NAME", help="Whose it is; it gets one of its own if not set.")
@click.option("--create-account", is_flag=True, help="Make the account if it is not there.")
@click.option("--admin", is_flag=True, help="All scopes; it is the owner's if no account is set.")
@click.option("--expires", metavar="DURATION", help="For example 12h or 30d; never if not set.")
@policy_options
@click.option(
    "--from",
    "source",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Create a key for each line of a CSV file ('-' is standard input).",
)
def create(
    home: Path,
    config: Path | None,
    as_json: bool,
    name: str,
    account: str | None,
    create_account: bool,
    admin: bool,
    expires: str | None,
    source: Path | None,
    **settings: Any,
) -> None:
    """Create a key and print it: this is the only time it is shown.

    The first line of a CSV file names its columns: name, account, expires, and settings as the
    options are called (rpm, tpm, max_parallel, budget, model, ...), or all of them in one column
    limits ("rpm=60; budget=10 per 30d").  What a line leaves out is as the options say.  All keys
    are made, or none; they are printed as CSV.
    """
    from pinaivu_box.cli.key_files import at_line, drafts, print_made
    from pinaivu_box.store.new_keys import Draft, NewKeys
    from pinaivu_box.store.views import new_key_view

    if admin and settings["scopes"]:
        raise UsageError("--admin is all scopes: leave out one of --admin and --scope.")
    if source is not None and name:
        raise UsageError("--from has the names in its file: leave --name out.")
    if create_account and account is None and source is None:
        raise UsageError("--create-account needs --account, which names it.")
    policy = with_options(Policy(scopes=SCOPES) if admin else Policy(), settings)
    if source is None:
        ends = None if expires is None else expiry(expires)
        wanted = [(0, Draft(name, account, policy, ends))]
    else:
        wanted = list(drafts(source, policy, account, expires))

    async def work(database: Any) -> list[Any]:
        batch = NewKeys(database, actor(), new_accounts=create_account)
        for line, draft in wanted:
            try:
                await batch.add(draft)
            except (InvalidBody, NotFound) as error:
                if source is None:
                    raise
                raise at_line(source, line, _why(error, create_account)) from error
        return await batch.write()

    made = [new_key_view(key, secret) for key, secret in with_database(home, work)]
    if source is not None:
        print_made(made, as_json)
        click.echo(f"{len(made)} keys: store them now, they are not shown again.", err=True)
    elif as_json:
        print_json(made[0])
    else:
        click.echo(made[0].key)
        click.echo(
            f"{made[0].id} of account {made[0].account}: store the key now, it is not shown again.",
            err=True,
        )
    _warn(home, config, [draft.policy for _, draft in wanted])


@keys.command()
@home_option
@json_option
@wide_option
@click.option("--account", metavar="NAME", help="Only this account's.")
@click.option("--all", "all_", is_flag=True, help="All of them, not only the newest 100.")
def ls(home: Path, as_json: bool, wide: bool, account: str | None, all_: bool) -> None:
    """List the newest keys (never the secrets)."""
    from pinaivu_box.store import accounts
    from pinaivu_box.store import keys as store
    from pinaivu_box.store.views import key_view

    async def work(database: Any) -> list[store.Key]:
        whose = None if account is None else (await accounts.find(database, account)).id
        return await store.ls(database, whose, limit=_ALL if all_ else 101)

    found = with_database(home, work)
    more = not all_ and len(found) > 100
    # The newest at the bottom, where one looks.
    shown = [key_view(key) for key in reversed(found[: 100 if more else None])]
    if as_json:
        print_json(shown)
    else:
        rows = [
            (
                key.id,
                key.name + (" (admin)" if key.admin else ""),
                key.account,
                f"{key.prefix}…{key.last_four}",
                key.state,
                short_time(key.expires_at, "never"),
                _limits(key),
                str(key.requests),
                str(key.tokens),
                short_time(key.last_used_at, "never"),
            )
            for key in shown
        ]
        print_table(_COLUMNS, rows, numbers=("REQUESTS", "TOKENS"), spared=_SPARED, wide=wide)
    if more:
        click.echo("There are older keys: --all lists them too.", err=True)


@keys.command()
@home_option
@json_option
@click.argument("key")
def show(home: Path, as_json: bool, key: str) -> None:
    """Show a key with all its settings (never the secret)."""
    from pinaivu_box.store import keys as store

    _print_key(with_database(home, lambda database: store.named(database, key)), as_json)


@keys.command()
@home_option
@config_option
@json_option
@click.argument("key")
@click.option("--name", help="What the key is for.")
@click.option("--expires", metavar="DURATION", help="From now, for example 30d.")
@policy_options
@click.option("--block", metavar="REASON", help="Refuse its requests until --unblock.")
@click.option("--unblock", is_flag=True, help="Serve its requests again.")
@click.option("--now", is_flag=True, help="With --block: stop its running requests too.")
def edit(
    home: Path,
    config: Path | None,
    as_json: bool,
    key: str,
    name: str | None,
    expires: str | None,
    block: str | None,
    unblock: bool,
    now: bool,
    **settings: Any,
) -> None:
    """Change what is given of a key's settings.

    The word 'none' puts one back to its default: --rpm none is no limit, --model none all models,
    --expires none never.  Repeatable options replace the whole list.
    """
    from msgspec import UNSET

    from pinaivu_box.store import keys as store

    if block is not None and (unblock or not block.strip()):
        raise UsageError("--block needs a reason, and excludes --unblock.")
    if now and block is None:
        raise UsageError("--now goes with --block (or 'keys revoke').")
    changes: dict[str, Any] = {} if expires is None else {"expires_at": expiry(expires)}

    async def work(database: Any) -> store.Key:
        found = await store.named(database, key)
        made = with_options(found.policy, settings)
        blocked = None if unblock else UNSET if block is None else block
        return await store.edit(
            database, found, actor(), name=name, policy=made, blocked=blocked, **changes
        )

    edited = with_database(home, work)
    if now:
        _stop(home, "PATCH", f"{edited.id}?now=true", {"blocked": block})
    _print_key(edited, as_json)
    _warn(home, config, [edited.policy])


@keys.command()
@home_option
@json_option
@click.argument("key")
@click.option(
    "--overlap",
    metavar="DURATION",
    help="How long the secret of now still works; 24h if not set, 0 ends it at once.",
)
def rotate(home: Path, as_json: bool, key: str, overlap: str | None) -> None:
    """Give a key a new secret and print it: this is the only time it is shown.

    Settings, limits and usage stay.  If the key is being rotated already, the secret from before
    that ends now.
    """
    from pinaivu_box.store import keys as store
    from pinaivu_box.store.views import new_key_view

    try:
        seconds = parse_span(store.OVERLAP if overlap is None else overlap)
    except ValueError as error:
        raise UsageError(f"--overlap: {error}.") from error
    if not 0 <= seconds <= LONGEST_LIFE:
        raise UsageError("--overlap is from 0 to 36500d.")

    async def work(database: Any) -> tuple[store.Key, str]:
        return await store.rotate(database, await store.named(database, key), seconds, actor())

    rotated, secret = with_database(home, work)
    view = new_key_view(rotated, secret)
    if as_json:
        print_json(view)
        return
    click.echo(secret)
    old = f"the old one works until {view.old_until}" if seconds else "the old one has ended"
    click.echo(f"{view.id}: store the new key now, it is not shown again; {old}.", err=True)


@keys.command()
@home_option
@json_option
@click.argument("key")
@click.option("--now", is_flag=True, help="Stop its running requests too.")
def revoke(home: Path, as_json: bool, key: str, now: bool) -> None:
    """Revoke a key for good."""
    from pinaivu_box.store import keys as store

    async def work(database: Any) -> store.Key:
        return await store.revoke(database, await store.named(database, key), actor())

    revoked = with_database(home, work)
    click.echo(f"{revoked.id} is revoked.", err=True)
    if now:
        _stop(home, "POST", f"{revoked.id}/revoke?now=true")
    if as_json:
        _print_key(revoked, as_json)


def _why(error: ApiError, create_account: bool) -> str:
    """Why a line's key cannot be made."""
    if isinstance(error, InvalidBody):
        return f"{error.loc[-1]}: {error.message}"
    return error.message + ("" if create_account else " --create-account makes it.")


def _warn(home: Path, config: Path | None, made: list[Policy]) -> None:
    """Of budgets that hold nothing back."""
    try:
        pricing = load_config(home, config).pricing
    except CliError:  # the box will not start with it either, and says why
        return
    if any(policy.budget is not None and free_of_charge(policy, pricing) for policy in made):
        click.echo(f"warning: {UNPRICED}", err=True)


def _stop(home: Path, method: str, path: str, body: Any = None) -> None:
    """What is in the database already, said to the server that runs the key's requests."""
    try:
        stopped = ask_running(home, f"/v1/admin/keys/{path}", method=method, body=body)["stopped"]
    except NotRunning:
        click.echo("No box is running here: there was nothing to stop.", err=True)
    else:
        click.echo(f"{stopped} running requests were stopped.", err=True)


def _print_key(key: Any, as_json: bool) -> None:
    from msgspec import to_builtins

    from pinaivu_box.store.views import key_view

    view = key_view(key)
    if as_json:
        print_json(view)
        return
    shown: dict[str, Any] = to_builtins(view)
    policy = shown.pop("policy")
    for name, value in {**shown, **policy}.items():
        text = ", ".join(value) if isinstance(value, tuple | list) else value
        click.echo(f"{name:14}{NONE if text in (None, '', {}) else text}")


def _limits(key: Any) -> str:
    """What is set, in few words."""
    policy = key.policy
    said = [
        f"{value} {name}"
        for name, value in (
            ("rpm", policy.rpm),
            ("tpm", policy.tpm),
            ("parallel", policy.max_parallel),
        )
        if value is not None
    ]
    if policy.budget is not None:
        period = f" per {policy.budget.period}" if policy.budget.period else ""
        said.append(f"{key.spent} of {policy.budget.amount}{period}")
    said += ["models"] * bool(policy.models) + ["networks"] * bool(policy.networks)
    return ", ".join(said)
