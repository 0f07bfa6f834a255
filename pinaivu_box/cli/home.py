"""What most commands need: the home directory, its database, its running server."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click
import msgspec

from pinaivu_box import config as configs
from pinaivu_box.errors import CliError

T = TypeVar("T")


class Running(msgspec.Struct, frozen=True):
    """`run.json` in the home (0600): how commands reach the server that runs on it."""

    pid: int
    url: str
    token: str


def home_option(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        "--home",
        type=click.Path(path_type=Path, file_okay=False),
        default=configs.default_home,
        help="The box's directory.  [env: PINAIVU_HOME]",
    )(command)


def config_option(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        "--config",
        type=click.Path(path_type=Path, dir_okay=False),
        help="Configuration file; HOME/config.toml if it exists.",
    )(command)


def json_option(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(command)


def print_json(value: Any) -> None:
    click.echo(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())


def print_table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: Collection[str] = ()
) -> None:
    """A plain table; the columns named in `numbers` are set to the right.

    Into a pipe it is as wide as it needs to be: nothing is cut off there.
    """
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right" if column in numbers else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 1000).print(table)


def with_database(home: Path, work: Callable[[Any], Awaitable[T]]) -> T:
    """Run `work` on the home's database; the server may be running on it or not."""
    from pinaivu_box.box import database_of

    async def run() -> T:
        async with database_of(home) as database:
            return await work(database)

    return asyncio.run(run())


def load_config(home: Path, path: Path | None, **more: Any) -> configs.Config:
    """The given file, or the home's `config.toml` if there is one."""
    standard = home / "config.toml"
    return configs.load(path or (standard if standard.exists() else None), **more)


def write_running(home: Path, running: Running) -> None:
    import os

    path = home / "run.json"
    path.unlink(missing_ok=True)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "wb") as file:
        file.write(msgspec.json.encode(running))


def ask_running(home: Path, path: str) -> Any:
    """GET from the server that runs on this home; CliError if there is none."""
    import httpx

    try:
        running = msgspec.json.decode((home / "run.json").read_bytes(), type=Running)
        answer = httpx.get(
            running.url + path,
            headers={"Authorization": f"Bearer {running.token}"},
            timeout=10,
            trust_env=False,  # it is on this machine: no proxy
        )
        answer.raise_for_status()
    except (OSError, msgspec.DecodeError, httpx.HTTPError) as error:
        raise CliError(f"No box is running on {home}: start one with 'pinaivu serve'.") from error
    return answer.json()
