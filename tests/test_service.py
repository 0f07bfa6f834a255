"""`pinaivu service` as its users call it, with stand-ins for systemd's programs; and the units, as
systemd itself reads them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from pinaivu_box.doctor.service import installed as examined
from pinaivu_box.errors import ConfigurationInvalid, UsageError
from pinaivu_box.systemd import executable
from tests.support.in_process_command import run_command
from tests.support.process_box import environment
from tests.support.systemd_programs import SystemdPrograms

NO_SYSTEMD = (
    "System has not been booted with systemd as init system (PID 1). Can't operate.\n"
    "Failed to connect to bus: Host is down"
)
needs_systemd_analyze = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed"
)


class Machine:
    """A user's part of a machine with systemd."""

    def __init__(self, folder: Path) -> None:
        self.programs = SystemdPrograms(folder)
        self.settings = folder / "settings"
        self.home = folder / "data" / "pinaivu"
        self.executable = folder / "bin" / "pinaivu"
        self.executable.parent.mkdir()
        self.executable.write_text("#!/bin/sh\n")
        self.executable.chmod(0o755)
        self.unit = self.settings / "systemd" / "user" / "pinaivu.service"

    def run(
        self, *args: str, check: bool = True, **systemd: Any
    ) -> subprocess.CompletedProcess[str]:
        env = {
            **self.programs.environment(**systemd),
            "XDG_CONFIG_HOME": str(self.settings),
            "XDG_DATA_HOME": str(self.home.parent),
        }
        return run_command("service", *args, home=None, check=check, env=env)

    def install(
        self, *args: str, check: bool = True, **systemd: Any
    ) -> subprocess.CompletedProcess[str]:
        scope = () if "--system" in args else ("--user",)
        program = () if "--executable" in args else ("--executable", str(self.executable))
        return self.run("install", *scope, *program, *args, check=check, **systemd)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def unit_of(printed: str) -> str:
    """The unit in what `service install` prints."""
    text, _, _ = printed.partition("Steps:")
    return re.sub(r"^    ", "", text.partition("\n\n")[2], flags=re.MULTILINE)


def settings_of(unit: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in unit.splitlines():
        name, separator, value = line.partition("=")
        if separator and not line.startswith("#"):
            found.setdefault(name, []).append(value)
    return found


# -- commands ------------------------------------------------------------------------------------


def test_install_says_what_it_does_and_does_it(machine: Machine) -> None:
    dry = machine.install("--dry-run", "--port", "4101").stdout
    assert not machine.unit.exists() and machine.programs.calls() == []
    done = machine.install("--port", "4101").stdout
    assert done.startswith(dry)
    assert machine.unit.read_text() == unit_of(dry).rstrip("\n") + "\n"
    steps = dry.partition("Steps:\n\n")[2].splitlines()
    assert steps[0].strip() == f"write {machine.unit}"
    assert machine.programs.calls() == [
        "systemctl --user daemon-reload",
        "systemctl --user enable pinaivu.service",
        "systemctl --user restart pinaivu.service",
    ]
    assert [line.strip() for line in steps[1:] if line] == [
        "systemctl --user daemon-reload",
        "systemctl --user enable pinaivu.service",
        "systemctl --user restart pinaivu.service",
    ]
    # What comes next: where it is, a key, and that it would end with the session.
    assert "http://localhost:4101/v1" in done
    assert f"{machine.executable} keys create --admin --home {machine.home}" in done
    assert "loginctl enable-linger" in done


def test_install_again_brings_it_up_to_date(machine: Machine) -> None:
    machine.install()
    before = machine.unit.read_text()
    machine.install("--host", "0.0.0.0", "--no-start")
    assert machine.unit.read_text() != before and "--host 0.0.0.0" in machine.unit.read_text()
    assert not any("restart" in call for call in machine.programs.calls()[3:])
    machine.install()
    assert machine.unit.read_text() == before
    assert [path.name for path in machine.unit.parent.iterdir()] == ["pinaivu.service"]


def test_several_services_have_names_and_homes(machine: Machine, tmp_path: Path) -> None:
    machine.install()
    machine.install("--name", "second", "--home", str(tmp_path / "second"), "--port", "4002")
    units = sorted(path.name for path in machine.unit.parent.iterdir())
    assert units == ["pinaivu.service", "second.service"]
    machine.programs.calls()
    machine.run("uninstall", "--name", "second")
    assert machine.unit.exists()
    assert machine.programs.calls()[0] == "systemctl --user disable --now second.service"
    for name in ("", "../x", "a b", "A", "x" * 41, "a\n"):
        refused = machine.install("--name", name, check=False)
        assert (refused.returncode, len(refused.stderr.splitlines())) == (2, 1)


def test_a_unit_of_another_program_is_left_alone(machine: Machine) -> None:
    machine.unit.parent.mkdir(parents=True)
    machine.unit.write_text("[Service]\nExecStart=/bin/true\n")
    for command in ("install", "status", "uninstall"):
        refused = machine.run(command, "--user", check=False)
        assert refused.returncode == 1 and "was not written by" in refused.stderr
    assert machine.unit.read_text() == "[Service]\nExecStart=/bin/true\n"


def test_uninstall_leaves_the_home_and_says_where_it_is(machine: Machine) -> None:
    machine.home.mkdir(parents=True)
    (machine.home / "pinaivu.db").touch()
    machine.install()
    machine.programs.calls()
    done = machine.run("uninstall")
    assert not machine.unit.exists() and (machine.home / "pinaivu.db").exists()
    assert done.stdout.endswith(f"left as it is: {machine.home}\n")
    assert machine.programs.calls() == [
        "systemctl --user disable --now pinaivu.service",
        "systemctl --user daemon-reload",
        "systemctl --user reset-failed pinaivu.service",
    ]
    gone = machine.run("uninstall", check=False)
    assert gone.returncode == 1 and "'pinaivu service install' installs it" in gone.stderr


def test_status_says_what_the_service_says(machine: Machine) -> None:
    machine.install()
    shown = "ActiveState=active\nSubState=running\nStatusText=Serving 2 models, 1 request running"
    done = machine.run("status", shown=f"{shown}\nMainPID=77\nNRestarts=0\nMemoryCurrent=5000000")
    for text in ("active (running)", "Serving 2 models, 1 request running", "77", "5 MB"):
        assert text in done.stdout
    assert str(machine.home) in done.stdout
    ended = machine.run(
        "status", "--json", shown="ActiveState=failed\nSubState=failed", check=False
    )
    assert ended.returncode == 3 and '"running": false' in ended.stdout


def test_logs_are_journalctls(machine: Machine) -> None:
    machine.install()
    machine.programs.calls()
    machine.run("logs", "-f", "-n", "5", "--request", "req_1")
    assert machine.programs.calls() == [
        "journalctl --user-unit=pinaivu.service --lines=5 --follow REQUEST_ID=req_1"
    ]


def test_the_doctor_looks_at_the_service_of_its_home(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(machine.settings))
    assert list(examined(machine.home)) == []
    machine.install()
    (check,) = examined(machine.home)
    assert check.state == "warning" and check.todo.endswith("loginctl enable-linger")
    machine.executable.unlink()
    (check,) = examined(machine.home)
    assert check.state == "failed" and str(machine.executable) in check.found
    assert list(examined(machine.home / "another")) == []


def test_the_commands_of_the_documentation_are_there() -> None:
    text = (Path(__file__).parent.parent / "docs" / "service.md").read_text()
    lines = re.findall(r"^    (?:sudo )?pinaivu service ([^#\n]*)", text, re.MULTILINE)
    assert len(lines) >= 6
    for line in lines:
        command, *options = line.split()
        printed = run_command("service", command, "--help", home=None).stdout
        assert all(option in printed for option in options), line


# -- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("refusal", "words"),
    [
        (NO_SYSTEMD, "systemd does not run on this machine"),
        ("Failed to connect to bus: No medium found", "ssh"),
    ],
)
def test_without_a_manager_a_sentence_says_so(machine: Machine, refusal: str, words: str) -> None:
    done = machine.install(check=False, refusal=refusal)
    assert done.returncode == 1 and words in done.stderr and len(done.stderr.splitlines()) == 1
    assert not machine.unit.exists() and done.stdout == ""
    assert "[Service]" in machine.install("--dry-run", refusal=refusal).stdout


def test_without_systemctl_the_same(machine: Machine, tmp_path: Path) -> None:
    env = {"PATH": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path)}
    args = ("install", "--user", "--executable", str(machine.executable))
    done = run_command("service", *args, home=None, check=False, env=env)
    assert done.returncode == 1 and "systemd does not run on this machine" in done.stderr
    assert "[Service]" in run_command("service", *args, "--dry-run", home=None, env=env).stdout


def test_a_service_that_does_not_start_says_where_to_look(machine: Machine) -> None:
    done = machine.install(check=False, failure="Job for pinaivu.service failed.")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line == (
        "pinaivu: 'systemctl --user restart pinaivu.service' failed: Job for pinaivu.service "
        "failed. 'pinaivu service logs' shows why."
    )


@pytest.mark.skipif("PINAIVU_BINARY" in os.environ, reason="the executable is no part of a clone")
def test_a_clone_is_no_program_to_rely_on(machine: Machine) -> None:
    done = machine.run("install", "--user", "--dry-run", check=False)
    assert done.returncode == 1
    assert "part of a clone" in done.stderr and "build/binary" in done.stderr


def test_an_executable_has_to_be_where_it_stays(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an executable, which is a program of its own (`sys.frozen`), the place counts."""
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    monkeypatch.setattr(sys, "executable", str(machine.executable))
    monkeypatch.setattr(tempfile, "tempdir", str(machine.executable.parents[1]))
    done = machine.run("install", "--user", "--dry-run", check=False)
    assert done.returncode == 1 and "a folder for temporary files" in done.stderr
    monkeypatch.setattr(executable, "_TEMPORARY", ())
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")
    unit = unit_of(machine.run("install", "--user", "--dry-run").stdout)
    assert f"ExecStart={machine.executable} serve --home" in unit
    # A service of the system sees no home directory.
    monkeypatch.setattr(executable, "_HOMES", (str(machine.executable.parents[1]),))
    done = machine.run("install", "--system", "--dry-run", check=False)
    assert done.returncode == 1 and f"'install {machine.executable} /usr/local/bin" in done.stderr


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--executable", "/nowhere/pinaivu"), "no program that can be run"),
        (("--home", "/home/ann/box"), "does not see"),
        (("--port", "70000"), "70000"),
        (("--user",), "exclude"),
    ],
)
def test_what_a_system_service_cannot_have(
    machine: Machine, args: tuple[str, ...], words: str
) -> None:
    done = machine.install("--system", "--dry-run", *args, check=False)
    assert done.returncode != 0 and words in done.stderr


def test_an_invalid_configuration_is_refused_before_anything_is_done(machine: Machine) -> None:
    machine.home.mkdir(parents=True)
    (machine.home / "config.toml").write_text("[server]\nprot = 1\n")
    done = machine.install(check=False)
    assert done.returncode == ConfigurationInvalid.exit_code and "prot" in done.stderr
    assert machine.programs.calls() == []


# -- units ---------------------------------------------------------------------------------------


def test_a_unit_fits_what_the_box_does(machine: Machine) -> None:
    machine.home.mkdir(parents=True)
    (machine.home / "config.toml").write_text("[server]\ndrain_seconds = 300\n")
    settings = settings_of(unit_of(machine.install("--dry-run").stdout))
    assert settings["Type"] == ["notify"]
    assert settings["TimeoutStopSec"] == ["330"]
    # The process that systemd starts is the one that notifies it and reloads.
    assert settings.get("NotifyAccess", ["main"]) == ["main"]
    assert settings["ExecReload"] == ['/bin/sh -c "kill -HUP ${MAINPID}"']
    assert settings["OOMPolicy"] == ["continue"]
    # Who cannot start because of what is configured is not started for ever.
    codes = set(settings["RestartPreventExitStatus"][0].split())
    assert codes == {str(UsageError.exit_code), str(ConfigurationInvalid.exit_code)}
    assert "User" not in settings and "ProtectHome" not in settings


@pytest.mark.parametrize(("version", "backs_off"), [(249, False), (252, False), (254, True)])
def test_restarts_back_off_where_systemd_can(
    machine: Machine, version: int, backs_off: bool
) -> None:
    settings = settings_of(unit_of(machine.install("--dry-run", version=version).stdout))
    assert ("RestartSteps" in settings) is backs_off
    assert settings["RestartSec"] == ["1" if backs_off else "10"]
    assert settings["StartLimitIntervalSec"] == ["0"]


def test_a_low_port_is_the_one_capability(machine: Machine) -> None:
    def capabilities(*args: str) -> list[str]:
        unit = unit_of(machine.install("--system", "--dry-run", *args).stdout)
        return settings_of(unit)["CapabilityBoundingSet"]

    assert capabilities() == [""]
    assert capabilities("--port", "443") == ["CAP_NET_BIND_SERVICE"]


def test_the_home_of_a_system_service(machine: Machine) -> None:
    def settings(*args: str) -> dict[str, list[str]]:
        return settings_of(unit_of(machine.install("--system", "--dry-run", *args).stdout))

    usual = settings("--name", "box")
    assert usual["StateDirectory"] == ["box"] and "ReadWritePaths" not in usual
    assert usual["Home"] == ["/var/lib/box"]
    other = machine.install("--system", "--dry-run", "--home", "/srv/a box").stdout
    assert settings_of(unit_of(other))["ReadWritePaths"] == ['"/srv/a box"']
    assert "install -d -m 0700 -o pinaivu -g pinaivu '/srv/a box'" in other


def test_the_services_of_the_system_share_the_cache_that_the_executable_unpacks_into(
    machine: Machine,
) -> None:
    """They have one user, and the launcher goes by XDG_CACHE_HOME (tests/test_launcher.py)."""
    for args in ((), ("--name", "second"), ("--home", "/srv/box")):
        unit = unit_of(machine.install("--system", "--dry-run", *args).stdout)
        settings = settings_of(unit)
        assert settings["CacheDirectory"] == ["pinaivu"]
        assert settings["Environment"] == ["XDG_CACHE_HOME=/var/cache/pinaivu"]
        assert settings["ExecPaths"] == ["/var/cache/pinaivu"]
    assert "XDG_CACHE_HOME" not in machine.install("--dry-run").stdout


def verify(unit: Path, *options: str) -> str:
    """What systemd finds wrong with a unit."""
    done = subprocess.run(
        ["systemd-analyze", *options, "verify", "--man=no", str(unit)],
        capture_output=True,
        text=True,
        env=environment(XDG_RUNTIME_DIR=str(unit.parent)),
    )
    return done.stderr


@needs_systemd_analyze
@pytest.mark.parametrize("scope", ["--system", "--user"])
@pytest.mark.parametrize("version", [249, 254])
def test_systemd_takes_the_units(
    machine: Machine, tmp_path: Path, scope: str, version: int
) -> None:
    strange = tmp_path / "a b" / "100%c $d"
    strange.parent.mkdir()
    shutil.copy2(machine.executable, strange)
    home = tmp_path / "a % home"
    args = (scope, "--dry-run", "--executable", str(strange), "--home", str(home))
    unit = tmp_path / "pinaivu.service"
    unit.write_text(unit_of(machine.run("install", *args, version=version).stdout))
    found = verify(unit, *((scope,) if scope == "--user" else ()))
    found = re.sub(r".*Unknown key (name )?'Restart(Steps|MaxDelaySec)'.*\n", "", found)
    assert found == ""
    # So that the check above is known to see a path that is not the executable's.
    unit.write_text(unit.read_text().replace("%%c", "c"))
    assert "is not executable" in verify(unit, *((scope,) if scope == "--user" else ()))


@needs_systemd_analyze
def test_the_system_unit_is_hardened(machine: Machine, tmp_path: Path) -> None:
    unit = tmp_path / "pinaivu.service"
    unit.write_text(unit_of(machine.install("--system", "--dry-run").stdout))
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=yes", "--no-pager", "--threshold=30", str(unit)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Overall exposure level" in done.stdout
