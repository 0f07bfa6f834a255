"""Checks of the service that `pinaivu service install` has made for a home."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from pinaivu_box.doctor.check import Check
from pinaivu_box.systemd import manager
from pinaivu_box.systemd.installation import this_user
from pinaivu_box.systemd.manager import Installed


def installed(home: Path) -> Iterator[Check]:
    """One check for each service of that home; none if it has no service."""
    for service in manager.all_installed():
        if service.home == home:
            yield _examined(service)


def _examined(service: Installed) -> Check:
    unit, executable = service.path.name, service.executable
    if not os.access(executable, os.X_OK):
        finding = f"{unit} starts {executable}, which is no program that can be run"
        return Check("service", "failed", finding, "'pinaivu service install' with one that is")
    if not service.system and not manager.lingers(this_user()):
        finding = f"{unit} ends when {this_user()} logs out of this machine"
        return Check("service", "warning", finding, "if it is to go on: loginctl enable-linger")
    return Check("service", "ok", f"{unit} starts {executable}")
