"""Asks systemd, by its own commands, and finds the units that this program has installed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from msgspec import Struct

from pinaivu_box.errors import CliError
from pinaivu_box.systemd.unit import OLDEST_VERSION, home_and_executable

SYSTEM_UNITS = Path("/etc/systemd/system")
_LINGER = Path("/var/lib/systemd/linger")
_VERSION = re.compile(r"systemd ([0-9]{1,5})(?![0-9]).*", re.DOTALL)
_NO_SYSTEMD = (
    "systemd does not run on this machine, so it can install no service: start 'pinaivu serve' by "
    "what starts programs here, or in a container (docs/service.md)."
)
_NO_SESSION = (
    " Log in as this user, by ssh for example ('su' and 'sudo' start no manager), or install the "
    "service for the system: 'sudo pinaivu service install'."
)


class Installed(Struct, frozen=True):
    """A unit that `pinaivu service install` has written."""

    name: str
    system: bool
    path: Path
    home: Path
    executable: Path


def user_units() -> Path:
    chosen = os.environ.get("XDG_CONFIG_HOME")
    return (Path(chosen) if chosen else Path.home() / ".config") / "systemd" / "user"


def units_folder(system: bool) -> Path:
    return SYSTEM_UNITS if system else user_units()


def installed(name: str, system: bool) -> Installed | None:
    """The unit with that name, None if there is none.  Raises CliError if it is another's."""
    path = units_folder(system) / f"{name}.service"
    try:
        found = home_and_executable(path.read_text())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CliError(f"{path} cannot be read: {error.strerror}.") from error
    if found is None:
        raise CliError(
            f"{path} was not written by 'pinaivu service install': choose another --name."
        )
    return Installed(name, system, path, *found)


def all_installed() -> Iterator[Installed]:
    """The units of this user and of the system that can be read."""
    for system in (False, True):
        for path in sorted(units_folder(system).glob("*.service")):
            try:
                found = home_and_executable(path.read_text())
            except (OSError, UnicodeDecodeError):
                continue
            if found is not None:
                yield Installed(path.stem, system, path, *found)


def lingers(user: str) -> bool:
    """Whether the services of a user run while the user is not logged in."""
    return (_LINGER / user).exists()


def version() -> int:
    """That of systemd; the oldest that is supported if it cannot be asked."""
    done = _run("systemctl", "--version")
    match = _VERSION.fullmatch(done.stdout) if done else None
    return int(match[1]) if match else OLDEST_VERSION


def require(system: bool) -> None:
    """Raises CliError if there is no manager for such services."""
    done = systemctl(system, "show", "--property=Version")
    if done is None:
        raise CliError(_NO_SYSTEMD)
    if done.returncode == 0:
        return
    if "not been booted with systemd" in done.stderr:
        raise CliError(_NO_SYSTEMD)
    reason = next(iter(done.stderr.strip().splitlines()), "it says no reason")
    manager = "systemd" if system else "The service manager of this user"
    hint = "" if system else _NO_SESSION
    raise CliError(f"{manager} does not answer ({reason}).{hint}")


def systemctl(system: bool, *args: str) -> subprocess.CompletedProcess[str] | None:
    """Its output; None if there is no such program."""
    return _run(*systemctl_command(system, *args))


def systemctl_command(system: bool, *args: str) -> tuple[str, ...]:
    return ("systemctl", *(() if system else ("--user",)), *args)


def properties(service: Installed, *names: str) -> dict[str, str]:
    """What the manager says of a service.  Raises CliError."""
    require(service.system)
    done = systemctl(service.system, "show", f"--property={','.join(names)}", service.path.name)
    lines = done.stdout.splitlines() if done else []
    return {name: value for name, _, value in (line.partition("=") for line in lines)}


def _run(*command: str) -> subprocess.CompletedProcess[str] | None:
    if shutil.which(command[0]) is None:
        return None
    return subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
