"""The home of the box, as commands use it: its configuration, database and identity."""

from __future__ import annotations

import asyncio
import os
import pwd
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

from pinaivu_box import config as configs
from pinaivu_box.errors import InvalidValue, UsageError

T = TypeVar("T")


def load_config(home: Path, path: Path | None, **more: Any) -> configs.Config:
    """The given configuration file, or the home's `config.toml` if it exists.  Raises CliError."""
    standard = home / "config.toml"
    return configs.load(path or (standard if standard.exists() else None), **more)


def with_database(home: Path, work: Callable[[Any], Awaitable[T]]) -> T:
    """Run `work` on the home's database, whether or not a server is running on it.

    Raises UsageError for a value that is not valid, and what `work` raises.
    """
    from pinaivu_box.home import database_of

    async def run() -> T:
        async with database_of(home) as database:
            return await work(database)

    try:
        return asyncio.run(run())
    except InvalidValue as error:
        raise UsageError(f"{error.field.rpartition('.')[2]}: {error.message}.") from error


def actor() -> Any:
    """Who runs this command, for the audit trail: not what USER says, which anybody can set."""
    from pinaivu_box.store.audit import Actor

    try:
        name = pwd.getpwuid(os.getuid()).pw_name
    except KeyError:  # in a container, for example
        name = str(os.getuid())
    return Actor(f"cli:{name}", "local")


def own_node(home: Path) -> str:
    """The node id of the box on this home, "" if it has none yet.  Raises CliError."""
    from pinaivu_box.home import identity_of

    return identity_of(home).node_id if (home / "identity.key").exists() else ""
