"""What most commands need: the home directory, its database, its running server."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import click
import msgspec

from pinaivu_box import config as configs
from pinaivu_box.errors import CliError, InvalidBody, NotRunning, UsageError

T = TypeVar("T")


class RunningServer(msgspec.Struct, frozen=True):
    """`run.json` in the home (0600): how commands reach the server that runs on it."""

    pid: int
    url: str
    token: str


def _whole(_context: click.Context, _parameter: click.Parameter, home: Path) -> Path:
    """Finishes a restore that was cut off, before anything in the home is looked at."""
    try:
        cut_off = (home / "restore.ready").is_dir()
    except OSError:  # the command will say what is wrong with it
        return home
    if cut_off:
        from pinaivu_box.backup.restore import complete

        if aside := complete(home):
            click.echo(f"A restore was cut off and is now complete; before it: {aside}", err=True)
    return home


def home_option(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        "--home",
        type=click.Path(path_type=Path, file_okay=False),
        default=configs.default_home,
        callback=_whole,
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


def short_time(text: str | None, never: str = "-") -> str:
    """RFC 3339 in UTC, to the minute, for a table."""
    return never if text is None else text[:16].replace("T", " ")


def print_json(value: Any) -> None:
    click.echo(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())


def with_database(home: Path, work: Callable[[Any], Awaitable[T]]) -> T:
    """Run `work` on the home's database; the server may be running on it or not.

    What the store does not take was given wrongly: UsageError.
    """
    from pinaivu_box.home import database_of

    async def run() -> T:
        async with database_of(home) as database:
            return await work(database)

    try:
        return asyncio.run(run())
    except InvalidBody as error:
        raise UsageError(f"{error.loc[-1]}: {error.message}.") from error


def actor() -> Any:
    """Who runs this command, for the audit trail: not what USER says, which anybody can set."""
    import os
    import pwd

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


def load_config(home: Path, path: Path | None, **more: Any) -> configs.Config:
    """The given file, or the home's `config.toml` if there is one."""
    standard = home / "config.toml"
    return configs.load(path or (standard if standard.exists() else None), **more)


def write_running(home: Path, running: RunningServer) -> None:
    import os

    path = home / "run.json"
    path.unlink(missing_ok=True)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "wb") as file:
        file.write(msgspec.json.encode(running))


def ask_running(
    home: Path, path: str, *, method: str = "GET", body: Any = None, seconds: float = 10
) -> Any:
    """Ask the server that runs on this home.  Raises NotRunning, CliError if it refuses."""
    import httpx

    try:
        running = msgspec.json.decode((home / "run.json").read_bytes(), type=RunningServer)
        answer = httpx.request(
            method,
            running.url + path,
            headers={"Authorization": f"Bearer {running.token}"},
            json=body,
            timeout=seconds,
            trust_env=False,  # it is on this machine: no proxy
        )
    except (OSError, msgspec.DecodeError, httpx.HTTPError) as error:
        raise NotRunning(f"No box is running on {home}: start one with 'pinaivu serve'.") from error
    if answer.is_error:
        raise CliError(answer.json()["error"]["message"])
    return answer.json()


def follow_running(home: Path, path: str, body: Any, seconds: float) -> Iterator[Any]:
    """As `ask_running`, for an answer that comes line by line; `seconds` may pass without one."""
    import httpx

    try:
        running = msgspec.json.decode((home / "run.json").read_bytes(), type=RunningServer)
        with httpx.stream(
            "POST",
            running.url + path,
            headers={"Authorization": f"Bearer {running.token}"},
            json=body,
            timeout=httpx.Timeout(10, read=seconds),
            trust_env=False,
        ) as answer:
            if answer.is_error:
                raise CliError(msgspec.json.decode(answer.read())["error"]["message"])
            yield from map(msgspec.json.decode, answer.iter_lines())
    except (httpx.ReadError, httpx.ReadTimeout, httpx.RemoteProtocolError) as error:
        raise CliError("The box has stopped, or is stuck: 'pinaivu doctor' may know.") from error
    except (OSError, msgspec.DecodeError, httpx.HTTPError) as error:
        raise NotRunning(f"No box is running on {home}: start one with 'pinaivu serve'.") from error
