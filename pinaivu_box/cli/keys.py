"""`pinaivu keys create|ls|revoke`: on the home's database, whether a server runs on it or not."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from pinaivu_box.cli.home import home_option, json_option, print_json, print_table, with_database
from pinaivu_box.config import parse_duration
from pinaivu_box.errors import CliError, UsageError

_LONGEST_EXPIRY = 36500 * 86400.0  # seconds


@click.group()
def keys() -> None:
    """Create, list and revoke API keys."""


@keys.command()
@home_option
@json_option
@click.option("--name", default="", help="What the key is for.")
@click.option("--expires", metavar="DURATION", help="For example 12h or 30d; never if not set.")
@click.option("--admin", is_flag=True, help="May see every key's receipts and usage.")
def create(home: Path, as_json: bool, name: str, expires: str | None, admin: bool) -> None:
    """Create a key and print it: this is the only time it is shown."""
    from pinaivu_box.store import keys as store

    expires_at = None if expires is None else _expiry(expires)

    async def work(database: Any) -> tuple[store.Key, str]:
        return await store.create(database, name=name, admin=admin, expires_at=expires_at)

    key, secret = with_database(home, work)
    if as_json:
        print_json(
            {
                "id": key.id,
                "key": secret,
                "name": key.name,
                "prefix": key.prefix,
                "admin": key.admin,
                "expires_at": _iso(key.expires_at),
            }
        )
        return
    click.echo(secret)
    click.echo(f"{key.id}: store the key now, it is not shown again.", err=True)


@keys.command()
@home_option
@json_option
def ls(home: Path, as_json: bool) -> None:
    """List the keys (never the secrets)."""
    from pinaivu_box.store import keys as store

    found = with_database(home, store.ls)
    if as_json:
        print_json([_shown(key) for key in found])
        return
    print_table(
        ("ID", "NAME", "KEY", "STATE", "REQUESTS", "TOKENS", "LAST USED"),
        [
            (
                key.id,
                key.name + (" (admin)" if key.admin else ""),
                f"{key.prefix}…{key.last_four}",
                shown["state"],
                str(key.requests),
                str(key.tokens),
                shown["last_used_at"] or "never",
            )
            for key, shown in ((key, _shown(key)) for key in found)
        ],
        numbers=("REQUESTS", "TOKENS"),
    )


@keys.command()
@home_option
@click.argument("id_or_prefix")
def revoke(home: Path, id_or_prefix: str) -> None:
    """Revoke a key by its id or by the beginning of the key; it holds for the next request."""
    from pinaivu_box.store import keys as store

    async def work(database: Any) -> store.Key:
        found = await store.named(database, id_or_prefix)
        if not found:
            raise CliError(f"No key is called {id_or_prefix}: 'pinaivu keys ls' lists them.")
        if len(found) > 1:
            names = ", ".join(key.id for key in found)
            raise CliError(f"{id_or_prefix} fits {len(found)} keys ({names}): give more of it.")
        if found[0].revoked_at is None:
            await store.revoke(database, found[0].id)
        return found[0]

    key = with_database(home, work)
    click.echo(f"{key.id} is revoked.", err=True)


def _expiry(text: str) -> int:
    try:
        seconds = parse_duration(text)
    except ValueError as error:
        raise UsageError(f"--expires: {error}.") from error
    if seconds <= 0:
        raise UsageError("--expires must be longer than nothing.")
    if seconds > _LONGEST_EXPIRY:
        raise UsageError("--expires is at most 36500d, a hundred years.")
    return int((time.time() + seconds) * 1000)


def _shown(key: Any) -> dict[str, Any]:
    now = time.time_ns() // 1_000_000
    state = "revoked" if key.revoked_at else "expired" if key.expired(now) else "active"
    return {
        "id": key.id,
        "name": key.name,
        "prefix": key.prefix,
        "last_four": key.last_four,
        "admin": key.admin,
        "state": state,
        "created_at": _iso(key.created_at),
        "expires_at": _iso(key.expires_at),
        "revoked_at": _iso(key.revoked_at),
        "last_used_at": _iso(key.last_used_at),
        "requests": key.requests,
        "tokens": key.tokens,
    }


def _iso(milliseconds: int | None) -> str | None:
    if milliseconds is None:
        return None
    moment = datetime.fromtimestamp(milliseconds // 1000, UTC)
    return moment.isoformat().replace("+00:00", "Z")
