"""Which command a unit starts: one that is still there tomorrow."""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

import pinaivu_box
from pinaivu_box.errors import CliError

_TEMPORARY = ("/tmp", "/var/tmp", "/dev/shm", "/run")  # noqa: S108 - compared, not written
_HOMES = ("/home", "/root", "/run/user")  # which a system service does not see
_TARGETS = {False: "~/.local/bin/pinaivu", True: "/usr/local/bin/pinaivu"}


def command_of(chosen: Path | None, system: bool) -> tuple[str, ...]:
    """The command of the `chosen` executable, or of this program.

    Raises CliError for one that would not be there, or could not be read.
    """
    if chosen is not None:
        path = chosen.expanduser().absolute()
        if not shutil.which(path):
            raise CliError(f"{path} is no program that can be run.")
        command: tuple[str, ...] = (str(path),)
    else:
        command = _of_this_program(system)
    if system:
        _require_visible(command)
    return command


def _of_this_program(system: bool) -> tuple[str, ...]:
    frozen = getattr(sys, "frozen", False)
    # Of an executable that a link leads to, the link: an update may let it lead to another.
    named = shutil.which("pinaivu") if frozen else None
    same = named is not None and Path(named).samefile(sys.executable)
    path = Path(named).absolute() if named and same else Path(sys.executable)
    folder = path.parent if frozen else Path(pinaivu_box.__file__).parent
    target = _TARGETS[system]
    if (folder.parent / "build" / "setup.py").exists():
        raise CliError(
            f"This program is part of a clone ({folder.parent}), which changes: make an executable "
            f"with 'build/binary', copy it ('install -D dist/pinaivu {target}'), and run "
            f"'{target} service install'; or name a program with --executable."
        )
    temporary = (*_TEMPORARY, tempfile.gettempdir())
    if any(path.resolve().is_relative_to(place) for place in temporary):
        raise CliError(
            f"{path} is in a folder for temporary files: move it first, for example to {target}."
        )
    return (str(path),) if frozen else (str(path), "-m", "pinaivu_box")


def _require_visible(command: tuple[str, ...]) -> None:
    package = [] if len(command) == 1 else [str(Path(pinaivu_box.__file__).parent)]
    for part in [command[0], *package]:
        path = Path(part)
        hidden = next(
            (each for each in (path, path.resolve()) if any(map(each.is_relative_to, _HOMES))), None
        )
        if hidden is not None:
            target = _TARGETS[True]
            todo = (
                "install the package elsewhere, for example below /opt."
                if package
                else f"copy it ('install {path} {target}'), and run '{target} service install'."
            )
            raise CliError(
                f"{hidden} is in a home directory, which a service of the system does not see: "
                f"{todo}"
            )
