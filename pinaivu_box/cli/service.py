"""`pinaivu service`: the box as a service of systemd."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pinaivu_box.cli.addresses import url_of
from pinaivu_box.cli.call import Call
from pinaivu_box.cli.group import Group
from pinaivu_box.cli.options import standard_options
from pinaivu_box.cli.render import print_fields
from pinaivu_box.config import Config, default_home
from pinaivu_box.errors import CliError, UsageError, quoted
from pinaivu_box.text import megabytes, number

if TYPE_CHECKING:
    from pinaivu_box.systemd.installation import InstallationStep
    from pinaivu_box.systemd.manager import Installed
    from pinaivu_box.systemd.unit import Service

_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,39}")
_NOT_RUNNING = 3  # exit status, as of `systemctl status`
_PROPERTIES = (
    *("ActiveState", "SubState", "StatusText", "MainPID", "NRestarts", "MemoryCurrent"),
    *("ActiveEnterTimestamp", "UnitFileState"),
)


def _service_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --user, --system and --name; they arrive as `system`, None if none was given, and
    `name`."""

    @wraps(command)
    def called(*args: Any, user: bool, system: bool, name: str, **more: Any) -> Any:
        if user and system:
            raise UsageError("--user and --system exclude each other.")
        if not _NAME.fullmatch(name):
            raise UsageError(
                f"--name {quoted(name)}: a name has up to 40 letters a-z, digits, '-' and '_', and "
                "begins with a letter or digit."
            )
        return command(*args, system=(system if user or system else None), name=name, **more)

    decorated: Callable[..., Any] = called
    for option in (
        click.option("--name", default="pinaivu", show_default=True, help="Name of the service."),
        click.option("--system", is_flag=True, help="A service of the system.  [default for root]"),
        click.option("--user", is_flag=True, help="A service of this user.  [default]"),
    ):
        decorated = option(decorated)
    return decorated


@click.group(cls=Group)
def service() -> None:
    """Run the box as a service of systemd."""


@service.command()
@click.option(
    "--home",
    type=click.Path(path_type=Path, file_okay=False),
    help="Data directory.  [default: that of 'pinaivu serve', or /var/lib/NAME]",
)
@click.option("--host", default="", help="Listen address.  [default: as configured]")
@click.option("--port", type=click.IntRange(1, 65535), help="Port.  [default: as configured]")
@click.option(
    "--executable",
    type=click.Path(path_type=Path),
    help="Program that is started.  [default: this one]",
)
@click.option("--dry-run", is_flag=True, help="Print the unit and the steps, and do nothing.")
@click.option("--no-start", is_flag=True, help="Start it with the machine, but not now.")
@_service_options
def install(
    system: bool | None,
    name: str,
    home: Path | None,
    host: str,
    port: int | None,
    executable: Path | None,
    dry_run: bool,
    no_start: bool,
) -> None:
    """Install the service, or bring it up to date.

    Prints the unit and the steps before they are taken.  A service of the system runs as a user of
    its own, without access to home directories; one of a user runs as that user.
    """
    from pinaivu_box.systemd import installation, manager

    system = os.geteuid() == 0 if system is None else system
    if not dry_run:
        manager.require(system)
        if system and os.geteuid() != 0:
            raise CliError("A service of the system is installed by root: use sudo, or --user.")
    manager.installed(name, system)  # another's unit is not replaced
    wanted, config = _service(system, name, home, host, port or 0, executable)
    steps = installation.installing(wanted, start=not no_start)
    _print_steps(steps)
    if dry_run:
        return
    try:
        installation.take(steps)
    except CliError as error:
        hint = f"'{_command('logs', name, system)}' shows why."
        raise CliError(f"{error.message} {hint}" if not no_start else error.message) from error
    _print_next(wanted, config, started=not no_start)


def _service(
    system: bool, name: str, home: Path | None, host: str, port: int, executable: Path | None
) -> tuple[Service, Config]:
    """The service that the options describe, and its configuration.  Raises CliError."""
    from pinaivu_box.systemd import executable as executables
    from pinaivu_box.systemd import installation, manager, unit

    place = home or (unit.STATE / name if system else default_home())
    place = place.expanduser().absolute()
    if system and any(map(place.is_relative_to, ("/home", "/root", "/run/user"))):
        raise CliError(
            f"{place} is in a home directory, which a service of the system does not see: choose "
            f"another --home, such as {unit.STATE / name}."
        )
    overrides = {("server", "host"): host or None, ("server", "port"): port or None}
    config = Call(place).config(overrides=overrides)
    wanted = unit.Service(
        name=name,
        system=system,
        command=executables.command_of(executable, system),
        home=place,
        groups=installation.gpu_groups() if system else (),
        host=host,
        port=port,
        listens_at=config.server.port,
        drain_seconds=config.server.drain_seconds,
        version=manager.version(),
    )
    return wanted, config


def _print_steps(steps: Sequence[InstallationStep]) -> None:
    for step in steps:
        if step.content:
            click.echo(f"{step.file}:\n\n{textwrap.indent(step.content, '    ')}")
    click.echo("Steps:\n\n" + "".join(f"    {step.line}\n" for step in steps))


def _print_next(wanted: Service, config: Config, *, started: bool) -> None:
    from pinaivu_box.systemd import installation, manager

    state = "is running" if started else "starts with the machine"
    click.echo(
        f"The service '{wanted.name}' {state}: {url_of(config.server, config.server.port)}/v1"
    )
    as_user = ("sudo", "-u", wanted.user) if wanted.system else ()
    key = (*as_user, *wanted.command, "keys", "create", "--admin", "--home", str(wanted.home))
    click.echo(f"\nMake an API key with\n\n    {shlex.join(key)}\n")
    if not wanted.system and not manager.lingers(installation.this_user()):
        click.echo(
            "It ends when you log out of the machine, and starts when you log in. For a box that "
            "always runs:\n\n    loginctl enable-linger\n"
        )


@service.command()
@standard_options(home=False)
@_service_options
def status(call: Call, system: bool | None, name: str) -> None:
    """Show whether the service runs; exits with 3 if it does not."""
    from pinaivu_box.systemd import installation, manager

    found = _found(name, system)
    said = manager.properties(found, *_PROPERTIES)
    running = said.get("ActiveState") in ("active", "reloading")
    memory = number(said.get("MemoryCurrent", ""))  # none where systemd does not count it
    fields = {
        "service": found.path.name,
        "state": f"{said.get('ActiveState', '?')} ({said.get('SubState', '?')})",
        "status": said.get("StatusText", "") or "-",
        "since": said.get("ActiveEnterTimestamp", "") or "-",
        "pid": said.get("MainPID", "-"),
        "memory": "-" if memory is None else megabytes(memory),
        "restarts": said.get("NRestarts", "-"),
        "at start of machine": said.get("UnitFileState", "-"),
        "home": str(found.home),
        "executable": str(found.executable),
        "unit": str(found.path),
    }
    if not found.system:
        lingers = manager.lingers(installation.this_user())
        fields["after logout"] = "goes on" if lingers else "ends ('loginctl enable-linger')"
    call.print({"running": running, **fields}, lambda _: print_fields(fields))
    if not running:
        sys.exit(_NOT_RUNNING)


@service.command()
@click.option("-f", "--follow", is_flag=True, help="Go on with new lines.")
@click.option("-n", "--lines", type=click.IntRange(0), default=100, show_default=True)
@click.option("--request", metavar="ID", help="Only the lines of this request.")
@_service_options
def logs(system: bool | None, name: str, follow: bool, lines: int, request: str | None) -> None:
    """Show the log of the service, as journalctl has it."""
    found = _found(name, system)
    unit = "--unit" if found.system else "--user-unit"
    command = ["journalctl", f"{unit}={found.path.name}", f"--lines={lines}"]
    if follow:
        command.append("--follow")
    if request:
        command.append(f"REQUEST_ID={request}")
    try:
        sys.exit(subprocess.run(command).returncode)
    except FileNotFoundError as error:
        raise CliError("There is no journalctl on this machine, and so no journal.") from error


@service.command()
@_service_options
def uninstall(system: bool | None, name: str) -> None:
    """Stop and remove the service; its home with keys, receipts and models stays."""
    from pinaivu_box.systemd import installation, manager

    found = _found(name, system)
    if found.system and os.geteuid() != 0:
        raise CliError("A service of the system is removed by root: use sudo.")
    manager.require(found.system)
    steps = installation.removing(found)
    _print_steps(steps)
    installation.take(steps)
    click.echo(f"The service '{name}' is removed. Its home is left as it is: {found.home}")


def _found(name: str, system: bool | None) -> Installed:
    """The service of that name: this user's before that of the system, unless one is meant.

    Raises CliError.
    """
    from pinaivu_box.systemd import manager

    for each in (False, True) if system is None else (system,):
        if (found := manager.installed(name, each)) is not None:
            return found
    raise CliError(
        f"There is no service '{name}': '{_command('install', name, bool(system))}' installs it."
    )


def _command(command: str, name: str, system: bool) -> str:
    options = (*(("--name", name) if name != "pinaivu" else ()), *(("--system",) if system else ()))
    return shlex.join(("pinaivu", "service", command, *options))
