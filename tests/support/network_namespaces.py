"""Namespaces with cables between them, and boxes in them: two on one network, one behind a router
that masquerades.  Needs root, `ip`, and for the router `iptables`."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar

import httpx

from tests.support.fake_model import fake_text
from tests.support.process_box import PINAIVU, Box, environment

T = TypeVar("T")
SETTINGS = '[peering]\nname = "{}"\nport = 4002\n'
_CLONE_NEWNET = 0x40000000


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


class Namespace:
    """A namespace."""

    def __init__(self, name: str) -> None:
        self.name = f"pnv-{name}-{os.getpid()}"
        run("ip", "netns", "add", self.name)
        self.prefix = ("ip", "netns", "exec", self.name)
        self.run("ip", "link", "set", "lo", "up")
        self._inside = ThreadPoolExecutor(4, initializer=self._enter)

    def _enter(self) -> None:
        """This thread makes its sockets there."""
        with Path(f"/run/netns/{self.name}").open() as found:
            if ctypes.CDLL(None, use_errno=True).setns(found.fileno(), _CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "setns")

    def do(self, work: Callable[[], T]) -> T:
        return self._inside.submit(work).result()

    def run(self, *command: str) -> None:
        run(*self.prefix, *command)

    def address(self, device: str, address: str, route: str | None = None) -> None:
        self.run("ip", "addr", "add", address, "dev", device)
        self.run("ip", "link", "set", device, "up")
        if route is not None:
            self.run("ip", "route", "add", "default", "via", route)

    def end(self) -> None:
        self._inside.shutdown()
        subprocess.run(["ip", "netns", "del", self.name], check=False, capture_output=True)


def cable(one: Namespace, device: str, other: Namespace, there: str) -> None:
    run("ip", "link", "add", device, "netns", one.name, "type", "veth",
        "peer", there, "netns", other.name)  # fmt: skip


class NatNetwork:
    """`street` is the network that all but carl are on; carl is at home behind `router`."""

    def __init__(self) -> None:
        self.places: dict[str, Namespace] = {}
        self._lost = 0.0

    def build(self) -> None:
        """CalledProcessError, OSError if that is not permitted."""
        for name in ("street", "router", "anna", "ben", "carl"):
            self.places[name] = Namespace(name)
        street, router = self.places["street"], self.places["router"]
        street.run("ip", "link", "add", "br0", "type", "bridge")
        street.run("ip", "link", "set", "br0", "up")
        for number, name in enumerate(("anna", "ben", "router"), 1):
            cable(self.places[name], "eth0", street, name)
            street.run("ip", "link", "set", name, "master", "br0", "up")
            self.places[name].address("eth0", f"10.77.0.{number}/24")
        cable(self.places["carl"], "eth0", router, "home")
        router.address("home", "192.168.5.1/24")
        self.places["carl"].address("eth0", "192.168.5.2/24", route="192.168.5.1")
        router.run("sysctl", "-qw", "net.ipv4.ip_forward=1")
        router.run("iptables", "-t", "nat", "-A", "POSTROUTING", "-o", "eth0", "-j", "MASQUERADE")
        router.run("iptables", "-P", "FORWARD", "DROP")
        router.run("iptables", "-A", "FORWARD", "-i", "home", "-j", "ACCEPT")
        router.run("iptables", "-A", "FORWARD", "-m", "conntrack", "--ctstate",
                   "ESTABLISHED,RELATED", "-j", "ACCEPT")  # fmt: skip

    def cut(self, name: str, state: str = "down") -> None:
        """Pull somebody's cable out; "up" puts it in again."""
        self.places["street"].run("ip", "link", "set", name, state)

    def lose(self, share: float) -> None:
        """So much of what goes anywhere, until it is 0.  (`tc netem` is in few kernels.)"""
        for name, chain in (("anna", "INPUT"), ("ben", "INPUT"), ("router", "FORWARD")):
            rule = ("-p", "udp", "-m", "statistic", "--mode", "random", "--probability")
            if self._lost:
                self.places[name].run("iptables", "-D", chain, *rule, str(self._lost), "-j", "DROP")
            if share:
                self.places[name].run("iptables", "-I", chain, *rule, str(share), "-j", "DROP")
        self._lost = share

    def end(self) -> None:
        for place in self.places.values():
            place.end()


class NamespaceBox(Box):
    """A box that lives in a namespace."""

    def __init__(self, place: Namespace, home: Path, name: str, *args: str) -> None:
        super().__init__(home, "--peering", *args)
        self.place, self.prefix, self.name = place, place.prefix, name
        home.mkdir(parents=True)
        (home / "config.toml").write_text(SETTINGS.format(name))

    def http(self, method: str, path: str, **more: Any) -> httpx.Response:
        return self.place.do(lambda: super(NamespaceBox, self).http(method, path, **more))

    def command(self, *args: str) -> str:
        done = subprocess.run(
            [*self.prefix, *PINAIVU, *args, "--home", str(self.home)],
            capture_output=True, text=True, check=False, timeout=60, env=environment(),
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    def peers(self) -> dict[str, dict[str, Any]]:
        return {one["name"]: one for one in self.http("GET", "/v1/admin/peers").json()["data"]}

    def sees(self, *names: str) -> bool:
        """These are linked, and what they offer is known."""
        found = self.peers()
        return all(
            name in found and found[name]["state"] == "connected" and found[name]["models"]
            for name in names
        )


TOKENS = 300
SLOW = "fake:10"  # ms a token


def streamed(
    box: NamespaceBox, after: int, then: Callable[[str], None]
) -> tuple[str, dict[str, Any]]:
    """The whole text of a streamed answer, and its receipt; `then` is done with the name of the box
    that serves it once so many pieces have come."""
    body = {
        "model": "fake:1", "messages": [{"role": "user", "content": "Hello"}], "stream": True,
        "max_tokens": TOKENS, "stream_options": {"include_usage": True},
    }  # fmt: skip
    names = {one["id"]: name for name, one in box.peers().items()}
    pieces: list[str] = []
    usage: dict[str, Any] = {}

    def listen() -> None:
        with httpx.stream(
            "POST", f"{box.url}/v1/chat/completions", json=body, timeout=60, trust_env=False,
            headers={"Authorization": f"Bearer {box.key}"},
        ) as answer:  # fmt: skip
            assert answer.status_code == 200, answer.read()
            server = names[answer.headers["x-pinaivu-route"].split(";")[0]]
            for line in answer.iter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line.removeprefix("data: "))
                assert "error" not in event, event
                usage.update(event.get("usage") or {}, id=event["request_id"])
                pieces.extend(one["delta"].get("content") or "" for one in event["choices"])
                if len(pieces) == after:
                    Thread(target=then, args=(server,)).start()

    box.place.do(listen)
    assert "".join(pieces) == fake_text(usage["prompt_tokens"], TOKENS)
    found = box.http("GET", f"/v1/receipts/{usage['id']}").json()
    receipt: dict[str, Any] = json.loads(found["signed_receipt"])
    return "".join(pieces), receipt
