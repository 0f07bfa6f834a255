"""A box that asks and two that serve it, each a process with a home of its own, linked by iroh."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.support.peer_box import PeerBox
from tests.support.process_box import wait_until

# The fake model repeats itself: drafts make it fast.  Engines with several threads would wait for
# each other.
STEADY = "[engine]\ndrafting = false\nthreads = 1\n"


class Fleet:
    """`anna` is spoken to; `ben` and `carl` offer `model`, which anna need not have."""

    def __init__(
        self,
        folder: Path,
        model: str,
        asker: Sequence[str],
        servers: Sequence[str],
        more: str,
        served: str,
    ) -> None:
        self.model = model
        self.anna = PeerBox(folder / "anna", "anna", more, *asker)
        self.servers = {
            name: PeerBox(folder / name, name, served, *servers) for name in ("ben", "carl")
        }

    def start(self) -> None:
        for one in (self.anna, *self.servers.values()):
            one.start()
        for name, one in self.servers.items():
            one.peers("join", self.anna.invite("--name", name))
        self.ids = {name: found["id"] for name, found in self.anna.listed().items()}
        self.own = self.anna.admin("GET").json()["own"]["id"]
        self.wait()

    def wait(self) -> None:
        """Until both are linked and offer the model."""
        for name in self.servers:
            wait_until(lambda n=name: self.offers(n), f"{name} offers {self.model}")

    def offers(self, name: str, model: str = "") -> bool:
        peer = self.anna.sees(name)
        return peer is not None and (model or self.model) in [one["id"] for one in peer["models"]]

    def name_of(self, route: str) -> str:
        """The box that an `x-pinaivu-route`, or a node id, means."""
        node_id = route.partition(";")[0]
        return next((name for name, one in self.ids.items() if one == node_id), "anna")

    def key_for(self, *names: str) -> str:
        """A key whose requests go to these peers only."""
        body = {"policy": {"peers": names}}
        key: str = self.anna.http("POST", "/v1/admin/keys", json=body).json()["key"]
        return key

    def lose(self, name: str, how: signal.Signals) -> None:
        process = self.servers[name].process
        process.send_signal(how)
        if how == signal.SIGKILL:
            process.wait()

    def mend(self, name: str) -> None:
        """It is there again, and nothing is held against it."""
        box = self.servers[name]
        if box.process.poll() is None:
            box.process.send_signal(signal.SIGCONT)
        else:
            box.start()
        wait_until(lambda: self.offers(name), f"{name} is back")

    def end(self) -> None:
        for one in (self.anna, *self.servers.values()):
            if hasattr(one, "process"):
                one.process.send_signal(signal.SIGCONT)
                one.end()


@contextlib.contextmanager
def fleet(
    folder: Path,
    model: str,
    *,
    servers: Sequence[str],
    asker: Sequence[str] = (),
    more: str = "",
    served: str = STEADY,
) -> Iterator[Fleet]:
    """`servers` and `asker` are arguments of `serve`, `served` and `more` their settings."""
    made = Fleet(folder, model, asker, servers, more, served)
    try:
        made.start()
        yield made
    finally:
        made.end()
