"""A box under the restrictions of its own unit does all that it does."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import confined
from tests.support.in_process_command import run_command
from tests.support.process_box import Box, environment

ROOT = Path(__file__).parent.parent
# Each does what a restriction of the unit forbids.
FORBIDDEN = {
    "MemoryDenyWriteExecute": "import mmap; mmap.mmap(-1, 4096, prot=7)",
    "RestrictAddressFamilies": "import socket; socket.socket(socket.AF_PACKET, socket.SOCK_RAW)",
    "RestrictNamespaces": "import ctypes; assert not ctypes.CDLL(None).unshare(0x10000000)",
    "LockPersonality": "import ctypes; assert ctypes.CDLL(None).personality(8) >= 0",
    "RestrictSUIDSGID": "import os, tempfile; os.chmod(tempfile.mkstemp()[1], 0o4755)",
    "RestrictRealtime": "import os; os.sched_setscheduler(0, 1, os.sched_param(1))",
    "SystemCallFilter": "import os; os.chroot('/')",
}


def _has_seccomp() -> bool:
    try:
        ctypes.CDLL(confined.LIBRARY)
    except OSError:
        return False
    return shutil.which("systemd-analyze") is not None


pytestmark = pytest.mark.skipif(
    not _has_seccomp(), reason="libseccomp or systemd-analyze is not installed"
)


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """What confines a command as the unit of a system service does."""
    folder = tmp_path_factory.mktemp("unit")
    args = ("install", "--system", "--dry-run", "--executable", "/bin/sh")
    unit = folder / "pinaivu.service"
    unit.write_text(run_command("service", *args, home=None).stdout.replace("\n    ", "\n"))
    return (sys.executable, "-m", "tests.support.confined", str(unit))


@pytest.fixture
def box(prefix: tuple[str, ...], tmp_path: Path) -> Iterator[Box]:
    box = Box(tmp_path / "home", "--peering", env={"PINAIVU_PEERING_PORT": "0"})
    box.env["PYTHONPATH"] = str(ROOT)
    box.prefix = prefix
    yield box.start()
    box.end()


@pytest.mark.parametrize("name", FORBIDDEN)
def test_what_a_unit_forbids_is_forbidden_here(name: str, prefix: tuple[str, ...]) -> None:
    """So that the test below is known to test something."""

    def run(*before: str) -> int:
        command = [*before, sys.executable, "-c", FORBIDDEN[name]]
        env = environment(PYTHONPATH=str(ROOT))
        return subprocess.run(command, capture_output=True, env=env, cwd=ROOT).returncode

    assert run(*prefix) != 0


def test_a_confined_box_serves_checks_and_connects(box: Box) -> None:
    """An engine with the real model, a grammar and a template in sandboxes, a link over QUIC, a
    receipt, a reload, and a command beside it."""
    answer = box.chat("Name a colour.", max_tokens=24, response_format=SCHEMA)
    assert answer.status_code == 200, answer.text
    request_id = answer.json()["request_id"]
    assert run_command("receipts", "verify", request_id, home=box.home).returncode == 0
    peers = box.http("GET", "/v1/admin/peers").json()
    assert peers["data"] == []
    run_command("reload", home=box.home)
    assert box.http("GET", "/readyz").status_code == 200
    assert box.stop() == 0
    assert "Operation not permitted" not in box.errors


SCHEMA = {
    "type": "json_schema",
    "json_schema": {
        "name": "colour",
        "schema": {
            "type": "object",
            "properties": {"colour": {"type": "string", "enum": ["red", "blue"]}},
            "required": ["colour"],
            "additionalProperties": False,
        },
    },
}
