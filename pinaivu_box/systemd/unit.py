"""The text of a unit, see systemd.unit(5), systemd.service(5) and systemd.exec(5).

docs/service.md says what each restriction was compared with.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from msgspec import Struct

from pinaivu_box.errors import ConfigurationInvalid, UsageError

NAME = "pinaivu"
OURS = "[X-Pinaivu]"  # systemd passes over sections with this prefix
STATE = Path("/var/lib")
CACHE = Path("/var/cache") / NAME  # of the user's, whom all services of the system share
OLDEST_VERSION = 249  # of systemd: that of Ubuntu 22.04

_BACKOFF_VERSION = 254  # the first with RestartSteps
_WATCHDOG_SECONDS = 120
_START_SECONDS = 180  # the box asks for more while it still starts
_CLOSE_SECONDS = 30  # after the last request has ended
_FIRST_PRIVILEGED_PORT, _FIRST_FREE_PORT = 1, 1024

# Needs no privilege, so a user's manager can do it too.
_FOR_ALL = """\
NoNewPrivileges=yes
LockPersonality=yes
MemoryDenyWriteExecute=yes
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
SystemCallArchitectures=native
SystemCallErrorNumber=EPERM
SystemCallFilter=@system-service
SystemCallFilter=~@privileged
"""
_FOR_SYSTEM = """\
ProtectSystem=strict
ProtectHome=yes
PrivateTmp=yes
ProtectClock=yes
ProtectControlGroups=yes
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
ProtectProc=invisible
RemoveIPC=yes
KeyringMode=private
# Of devices, those that compute.
DevicePolicy=closed
DeviceAllow=char-drm rw
DeviceAllow=char-kfd rw
DeviceAllow=char-nvidia* rw
"""


class Service(Struct, frozen=True):
    """A service as it is to be installed.

    `command` starts this program; `groups` are those, of the ones that may use GPUs, that the
    machine has; `host` and `port` are options of `serve` ("" and 0: as configured);
    `listens_at` is the port that follows.
    """

    name: str
    system: bool
    command: tuple[str, ...]
    home: Path
    user: str = NAME
    groups: tuple[str, ...] = ()
    host: str = ""
    port: int = 0
    listens_at: int = 0
    drain_seconds: float = 60.0
    version: int = OLDEST_VERSION  # of systemd

    @property
    def unit(self) -> str:
        return f"{self.name}.service"

    @property
    def state(self) -> Path:
        """The home that systemd makes and gives to the user."""
        return STATE / self.name


def text(service: Service) -> str:
    """The unit's file.  Raises UsageError for a path that no unit can have."""
    return "\n".join(_lines(service)) + "\n"


def _lines(service: Service) -> Iterator[str]:
    yield "# Written by 'pinaivu service install', which replaces it."
    options = "" if service.system else "--user "
    yield f"# What you change belongs beside it: 'systemctl {options}edit {service.name}'."
    yield ""
    yield "[Unit]"
    yield "Description=Pinaivu Box"
    if service.system:
        yield "Wants=network-online.target"
        yield "After=network-online.target"
    yield "StartLimitIntervalSec=0"
    yield ""
    yield "[Service]"
    yield "Type=notify"
    yield f"ExecStart={_command(service)}"
    # The shell's own kill: a minimal system has no other.
    yield 'ExecReload=/bin/sh -c "kill -HUP ${MAINPID}"'
    yield "KillMode=mixed"
    yield f"TimeoutStartSec={_START_SECONDS}"
    yield f"TimeoutStopSec={math.ceil(service.drain_seconds) + _CLOSE_SECONDS}"
    yield f"WatchdogSec={_WATCHDOG_SECONDS}"
    yield from _restart(service)
    yield "# An engine that takes too much memory is ended and started again by the box."
    yield "OOMPolicy=continue"
    yield "LimitNOFILE=65536"
    yield "UMask=0077"
    yield ""
    yield from _FOR_ALL.splitlines()
    if service.system:
        yield from _of_system(service)
    yield ""
    yield "[Install]"
    yield f"WantedBy={'multi-user' if service.system else 'default'}.target"
    yield ""
    yield OURS
    yield f"Home={service.home}"
    yield f"Executable={service.command[0]}"


def _restart(service: Service) -> Iterator[str]:
    yield "Restart=on-failure"
    if service.version >= _BACKOFF_VERSION:
        yield "RestartSec=1"
        yield "RestartSteps=8"
        yield "RestartMaxDelaySec=5min"
    else:
        yield "RestartSec=10"
    yield f"RestartPreventExitStatus={UsageError.exit_code} {ConfigurationInvalid.exit_code}"


def _of_system(service: Service) -> Iterator[str]:
    yield ""
    yield f"User={service.user}"
    yield f"Group={service.user}"
    if service.groups:
        yield f"SupplementaryGroups={' '.join(service.groups)}"
    if service.home == service.state:
        yield f"StateDirectory={service.name}"
        yield "StateDirectoryMode=0700"
    else:
        yield f"ReadWritePaths={_quoted(str(service.home))}"
    yield f"CacheDirectory={CACHE.name}"
    yield f"Environment=XDG_CACHE_HOME={CACHE}"
    yield "# The executable is unpacked there, and runs from there."
    yield f"ExecPaths={CACHE}"
    binds = _FIRST_PRIVILEGED_PORT <= service.listens_at < _FIRST_FREE_PORT
    capability = "CAP_NET_BIND_SERVICE" if binds else ""
    yield f"CapabilityBoundingSet={capability}"
    yield f"AmbientCapabilities={capability}"
    yield from _FOR_SYSTEM.splitlines()


def _command(service: Service) -> str:
    options = ["serve", "--home", str(service.home)]
    if service.host:
        options += ["--host", service.host]
    if service.port:
        options += ["--port", str(service.port)]
    program, *words = [*service.command, *options]
    # Of a command, systemd replaces variables in all words but the first.
    return " ".join((_quoted(program), *(_quoted(word).replace("$", "$$") for word in words)))


def _quoted(word: str) -> str:
    """As one word of a command or a list of paths."""
    if not word.isprintable():
        raise UsageError(f"A unit cannot have the path {word!r}: choose another.")
    escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    plain = escaped == word and not set(" ';#") & set(word)
    return word if plain else f'"{escaped}"'


def home_and_executable(text: str) -> tuple[Path, Path] | None:
    """What a unit says that `text` has written; None if another program has."""
    _, found, section = text.partition(f"\n{OURS}\n")
    values = dict(_pairs(section.splitlines()))
    if not found or not {"Home", "Executable"} <= values.keys():
        return None
    return Path(values["Home"]), Path(values["Executable"])


def _pairs(lines: Sequence[str]) -> Iterator[tuple[str, str]]:
    for line in lines:
        name, separator, value = line.partition("=")
        if separator:
            yield name, value
