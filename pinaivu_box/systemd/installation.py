"""Installs and removes a service: first the steps, as they are shown, then what they do."""

from __future__ import annotations

import grp
import os
import pwd
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path

from msgspec import Struct

from pinaivu_box.errors import CliError
from pinaivu_box.systemd import manager, unit
from pinaivu_box.systemd.manager import Installed
from pinaivu_box.systemd.unit import Service

_GPU_GROUPS = ("render", "video")
_NO_LOGIN = ("/usr/sbin/nologin", "/sbin/nologin", "/bin/false")


class InstallationStep(Struct, frozen=True):
    """A command that is run, or a file that is written or (without `content`) removed."""

    command: tuple[str, ...] = ()
    file: Path | None = None
    content: str = ""
    may_fail: bool = False

    @property
    def line(self) -> str:
        """The step, as a person would do it."""
        if self.command:
            return shlex.join(self.command)
        assert self.file is not None
        path = shlex.quote(str(self.file))
        return f"write {path}" if self.content else f"rm {path}"


def gpu_groups() -> tuple[str, ...]:
    """Of the groups that may use GPUs, those of this machine."""
    return tuple(name for name in _GPU_GROUPS if _has_group(name))


def installing(service: Service, *, start: bool) -> list[InstallationStep]:
    """The steps that install a service, or bring an installed one up to date."""
    steps = _user_and_home(service) if service.system else []
    path = manager.units_folder(service.system) / service.unit
    steps.append(InstallationStep(file=path, content=unit.text(service)))
    steps.append(_systemctl(service.system, "daemon-reload"))
    steps.append(_systemctl(service.system, "enable", service.unit))
    if start:  # a running one starts anew, for its program or its unit may be another
        steps.append(_systemctl(service.system, "restart", service.unit))
    return steps


def removing(service: Installed) -> list[InstallationStep]:
    """The steps that remove a service; its home, its user and its key stay."""
    return [
        _systemctl(service.system, "disable", "--now", service.path.name),
        InstallationStep(file=service.path),
        _systemctl(service.system, "daemon-reload"),
        # Of a service that has failed, the manager would keep that it has.
        _systemctl(service.system, "reset-failed", service.path.name, may_fail=True),
    ]


def take(steps: Sequence[InstallationStep]) -> None:
    """Take the steps in order.  Raises CliError at the first that fails."""
    for step in steps:
        try:
            if step.command:
                _run(step)
            elif step.file is not None:
                _write_or_remove(step.file, step.content)
        except OSError as error:
            raise CliError(f"'{step.line}' failed: {error.strerror}.") from error


def _run(step: InstallationStep) -> None:
    done = subprocess.run(step.command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode != 0 and not step.may_fail:
        said = next(iter(done.stderr.strip().splitlines()), f"it exited with {done.returncode}")
        raise CliError(f"'{step.line}' failed: {said.rstrip('.')}.")


def _write_or_remove(path: Path, content: str) -> None:
    if not content:
        path.unlink(missing_ok=True)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(content)
    temporary.chmod(0o644)  # it has no secret, and whoever asks for the status reads it
    temporary.replace(path)


def _user_and_home(service: Service) -> list[InstallationStep]:
    steps: list[InstallationStep] = []
    try:
        owner: int | None = pwd.getpwnam(service.user).pw_uid
    except KeyError:
        owner = None
        shell = next((path for path in _NO_LOGIN if Path(path).exists()), _NO_LOGIN[0])
        options = ("--system", "--user-group", "--no-create-home", "--home-dir", str(service.home))
        steps.append(InstallationStep(("useradd", *options, "--shell", shell, service.user)))
    if service.home.exists():
        if owner is None or service.home.stat().st_uid != owner:
            home = shlex.quote(str(service.home))
            raise CliError(
                f"The home {service.home} belongs to another user than '{service.user}', as whom "
                f"the service runs: give it away ('chown -R {service.user}: {home}'), or choose "
                "another --home."
            )
    elif service.home != service.state:  # that one is made by systemd
        mode = ("-d", "-m", "0700", "-o", service.user, "-g", service.user)
        steps.append(InstallationStep(("install", *mode, str(service.home))))
    return steps


def _systemctl(system: bool, *args: str, may_fail: bool = False) -> InstallationStep:
    return InstallationStep(manager.systemctl_command(system, *args), may_fail=may_fail)


def _has_group(name: str) -> bool:
    try:
        grp.getgrnam(name)
    except KeyError:
        return False
    return True


def this_user() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:  # in a container, for example
        return str(os.getuid())
