"""Boxes in processes and homes of their own, linked by iroh on loopback."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.process_box import environment, wait_until
from tests.support.waiting import DEADLINE


class HeadlessBox:
    def __init__(self, home: Path) -> None:
        self.home = home
        self.lines: list[Any] = []
        self.process: subprocess.Popen[str]

    def start(self, *command: str) -> HeadlessBox:
        self.lines = []
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.headless_box", str(self.home), *command],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment(),
        )  # fmt: skip
        threading.Thread(target=self._read, args=(self.process, self.lines), daemon=True).start()
        wait_until(self._talks, f"the first word of {self.home.name}")
        return self

    def _read(self, process: subprocess.Popen[str], lines: list[Any]) -> None:
        assert process.stdout
        with process.stdout:
            for line in process.stdout:
                lines.append(json.loads(line))

    def _talks(self) -> bool:
        assert self.process.poll() is None, "it has ended"
        return bool(self.lines)

    def states(self) -> dict[str, str]:
        return {name: peer["state"] for name, peer in self.lines[-1].items()}

    def sees(self, *names: str) -> bool:
        """Exactly these, linked, and what they offer."""
        peers = self.lines[-1]
        return set(peers) == set(names) and all(
            peer["state"] == "connected" and "fake:1" in (peer["models"] or ())
            for peer in peers.values()
        )

    def kill(self) -> None:
        assert self.process.stdin
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()

    def stop(self) -> int:
        assert self.process.stdin
        self.process.stdin.close()
        return self.process.wait(DEADLINE)


@pytest.fixture
def members(tmp_path: Path) -> Iterator[list[HeadlessBox]]:
    made = [HeadlessBox(tmp_path / name) for name in ("one", "two", "three")]
    yield made
    for member in made:
        if member.process.poll() is None:
            member.kill()


def test_three_boxes_join_and_find_each_other_again(members: list[HeadlessBox]) -> None:
    one, two, three = members
    ticket = one.start("invite").lines[0]["ticket"]
    two.start("join", ticket)
    three.start("join", ticket)

    def all_see_all() -> bool:
        names = {member.home.name for member in members}
        return all(member.sees(*(names - {member.home.name})) for member in members)

    wait_until(all_see_all, "all to see all")
    two.kill()
    wait_until(lambda: three.states()["two"] != "connected", "three to miss two")
    two.start()
    wait_until(all_see_all, "two to be back")
    assert one.stop() == 0
    wait_until(lambda: three.states()["one"] != "connected", "one to be gone")
    one.start()  # on another port, and only it knows where the others are
    wait_until(all_see_all, "one to be back")
    assert [member.stop() for member in members] == [0, 0, 0]
