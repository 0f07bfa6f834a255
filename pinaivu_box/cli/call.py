"""The call of a command: its standard options, and the home that it works on."""

from __future__ import annotations

import asyncio
import os
import pwd
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import click

from pinaivu_box import config as configs
from pinaivu_box.cli.render import Column, print_json, print_table
from pinaivu_box.errors import InvalidValue, UsageError

T = TypeVar("T")


class Call(NamedTuple):
    """What the standard options say; `config_file` is None without --config."""

    home: Path
    config_file: Path | None = None
    as_json: bool = False
    wide: bool = False

    def config(self, **more: Any) -> configs.Config:
        """The given configuration, or the home's `config.toml` if it exists.  Raises CliError."""
        standard = self.home / "config.toml"
        return configs.load(self.config_file or (standard if standard.exists() else None), **more)

    def in_database(self, work: Callable[[Any], Awaitable[T]]) -> T:
        """Run `work` on the home's database, whether or not a server is running on it.

        Raises UsageError for a value that is not valid, and what `work` raises.
        """
        from pinaivu_box.home import database_of

        async def run() -> T:
            async with database_of(self.home) as database:
                return await work(database)

        try:
            return asyncio.run(run())
        except InvalidValue as error:
            raise UsageError(f"{error.field.rpartition('.')[2]}: {error.message}.") from error

    def node_id(self) -> str:
        """That of the box on this home, "" if it has none yet.  Raises CliError."""
        from pinaivu_box.home import identity_of

        exists = (self.home / "identity.key").exists()
        return identity_of(self.home).node_id if exists else ""

    def print(self, value: Any, print_text: Callable[[Any], object]) -> None:
        """Print a value as JSON or, without --json, by `print_text`."""
        if self.as_json:
            print_json(value)
        else:
            print_text(value)

    def report(self, sentence: str, value: Any) -> None:
        """Say on standard error what was done; with --json, also print a value."""
        click.echo(sentence, err=True)
        if self.as_json:
            print_json(value)

    def print_list(self, items: Sequence[Any], columns: Sequence[Column]) -> None:
        """Print items as JSON or, without --json, as a table."""
        self.print(items, lambda items: print_table(items, columns, wide=self.wide))


def actor() -> Any:
    """Who runs this command, for the audit trail: not what USER says, which anybody can set."""
    from pinaivu_box.store.audit import Actor

    try:
        name = pwd.getpwuid(os.getuid()).pw_name
    except KeyError:  # in a container, for example
        name = str(os.getuid())
    return Actor(f"cli:{name}", "local")
