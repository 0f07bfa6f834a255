"""Boxes with peering in processes and homes of their own, and what their operators type."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support.in_process_command import run_command
from tests.support.ports import free_port
from tests.support.process_box import PINAIVU, Box, environment, pinaivu, wait_until

# Set by tests/before/run_two_versions: the code of an earlier commit, and the boxes that run it.
OLD_CODE, OLD_BOXES = "PINAIVU_OLD_CODE", "PINAIVU_OLD_BOXES"
SETTINGS = '[peering]\nhost = "127.0.0.1"\nport = {}\nname = "{}"\n'
FAKE = ("--model", "fake:1=fake:0", "--peering")


class PeerBox(Box):
    """A box with a name, and the commands that its operator types."""

    def __init__(self, home: Path, name: str, more: str = "", *args: str) -> None:
        super().__init__(home, *FAKE, *args)
        self.name = name
        if (code := os.environ.get(OLD_CODE)) and is_old(name):
            self.prefix = ("env", "-C", code)
        home.mkdir(parents=True)
        (home / "config.toml").write_text(SETTINGS.format(free_port(), name) + more)

    def command(self, *args: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """A command of the box's own version on its home.  In this process if the box runs: one
        that a command opens keeps its UDP port as long as the process of the command."""
        if self.prefix:
            done = subprocess.run(
                [*self.prefix, *PINAIVU, *args, "--home", str(self.home)],
                capture_output=True, text=True, timeout=300, env=environment(),
            )  # fmt: skip
            if check and done.returncode != 0:
                raise AssertionError(f"pinaivu {args} exited {done.returncode}: {done.stderr}")
            return done
        runs = hasattr(self, "process") and self.process.poll() is None
        return (run_command if runs else pinaivu)(*args, home=self.home, check=check)

    def command_json(self, *args: str) -> Any:
        return json.loads(self.command(*args, "--json").stdout)

    def peers(self, *args: str) -> Any:
        return self.command_json("peers", *args)

    def refused(self, *args: str) -> tuple[int, str]:
        """The exit code and the one line of a command that does not work."""
        done = self.command("peers", *args, check=False)
        assert done.returncode != 0, done.stdout
        assert "Traceback" not in done.stderr and done.stderr.count("\n") == 1, done.stderr
        return done.returncode, done.stderr

    def invite(self, *args: str) -> str:
        ticket: str = self.peers("invite", *args)["ticket"]
        return ticket

    def admin(self, method: str, path: str = "", body: Any = None) -> Any:
        return self.http(method, f"/v1/admin/peers{path}", json=body)

    def listed(self) -> dict[str, dict[str, Any]]:
        """The other boxes by name, over HTTP: faster than the command, for waiting."""
        return {one["name"]: one for one in self.admin("GET").json()["data"]}

    def sees(self, name: str, state: str = "connected") -> dict[str, Any] | None:
        found = self.listed().get(name)
        return found if found is not None and found["state"] == state else None

    def alone(self) -> bool:
        return not [one for one in self.listed().values() if one["state"] == "connected"]


def is_old(name: str) -> bool:
    """Whether the box of that name runs the code of an earlier commit."""
    return (name == "anna") == (os.environ.get(OLD_BOXES) == "anna")


MakePeerBox = Callable[..., PeerBox]


def joined_boxes(member: MakePeerBox, *names: str) -> list[PeerBox]:
    """Running boxes; the first has invited the others, and all are connected to all."""
    boxes = [member(name).start() for name in names]
    for box in boxes[1:]:
        box.peers("join", boxes[0].invite("--name", box.name))
    for box in boxes:
        for other in boxes:
            if other is not box:
                wait_until(lambda b=box, o=other: b.sees(o.name), f"{box.name} sees {other.name}")
    return boxes
