"""Boxes that have no way to each other but a relay: a namespace each, with a cable to the relay's,
which forwards nothing.  A second cable, from anna to ben, can be plugged in."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx

from tests.support.network_namespaces import Namespace, NamespaceBox, cable
from tests.support.process_box import environment

PORT = 3340
URL = f"http://10.79.0.1:{PORT}"
ROOT = Path(__file__).parent.parent.parent


class RelayOnlyNetwork:
    """`dora` has a cable to anna alone, so she does not even reach the relay."""

    def __init__(self) -> None:
        self.places: dict[str, Namespace] = {}
        self.relay: subprocess.Popen[str] | None = None

    def build(self) -> None:
        """CalledProcessError, OSError if that is not permitted."""
        for name in ("relay", "anna", "ben", "dora"):
            self.places[name] = Namespace(name)
        places = self.places
        places["relay"].run("sysctl", "-qw", "net.ipv4.ip_forward=0")
        places["relay"].address("lo", "10.79.0.1/32")
        for number, name in enumerate(("anna", "ben"), 1):
            cable(places[name], "eth0", places["relay"], name)
            places["relay"].address(name, f"10.78.{number}.1/24")
            places[name].address("eth0", f"10.78.{number}.2/24", route=f"10.78.{number}.1")
        cable(places["anna"], "eth1", places["ben"], "eth1")
        cable(places["anna"], "eth2", places["dora"], "eth0")
        places["anna"].address("eth2", "10.78.4.1/24")
        places["dora"].address("eth0", "10.78.4.2/24", route="10.78.4.1")

    def plug(self, state: str = "up") -> None:
        """The cable from anna to ben."""
        for number, name in enumerate(("anna", "ben"), 1):
            if state == "up":
                self.places[name].address("eth1", f"10.78.3.{number}/24")
            else:
                self.places[name].run("ip", "addr", "flush", "dev", "eth1")
                self.places[name].run("ip", "link", "set", "eth1", "down")

    def open_relay(self) -> None:
        self.relay = subprocess.Popen(
            [*self.places["relay"].prefix, sys.executable, "-m", "tests.support.relay_server",
             "10.79.0.1", str(PORT)],
            stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment(),
        )  # fmt: skip
        assert self.relay.stdout is not None and self.relay.stdout.readline() == f"{URL}/\n"

    def close_relay(self) -> None:
        if self.relay is not None:
            with self.relay:  # it closes the pipe
                self.relay.kill()
            self.relay = None

    def ask(self, path: str) -> httpx.Response:
        """The relay, from where it lives."""
        return self.places["relay"].do(lambda: httpx.get(URL + path, timeout=60, trust_env=False))

    def end(self) -> None:
        self.close_relay()
        for place in self.places.values():
            place.end()


def relayed_box(
    valley: RelayOnlyNetwork, homes: Path, name: str, *args: str, more: str = ""
) -> NamespaceBox:
    box = NamespaceBox(valley.places[name], homes / name, name, *args)
    with (box.home / "config.toml").open("a") as settings:
        settings.write(f'relay = "{URL}"\n{more}')
    return box


def refused(box: NamespaceBox, *args: str) -> str:
    """What a command that fails says, all of it."""
    done = subprocess.run(
        [*box.prefix, sys.executable, "-m", "pinaivu_box", *args, "--home", str(box.home)],
        capture_output=True, text=True, check=False, timeout=60, env=environment(),
    )  # fmt: skip
    assert done.returncode != 0 and "Traceback" not in done.stderr, done
    return done.stdout + done.stderr


def checks(text: str) -> dict[str, dict[str, Any]]:
    return {one["name"]: one for one in json.loads(text)}
