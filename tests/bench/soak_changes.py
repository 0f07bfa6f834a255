"""What changes while the clients of a soak ask: keys, peers, the configuration."""

from __future__ import annotations

import asyncio
import random
import shutil
import signal
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from tests.bench.soak_load import FAR, Tenant, pause
from tests.support.peer_box import PeerBox
from tests.support.process_box import Box, wait_until

OVERLAPS = ("0", "10s", "1m")
AWAY_SECONDS = 15.0  # that ben is stopped
GUEST_SECONDS = 45.0  # that a guest stays


async def every(
    stopping: asyncio.Event,
    seconds: float,
    work: Callable[[], Awaitable[object]],
    failures: list[str],
) -> None:
    """Until it is to stop; what is begun is finished.  Whatever fails is noted, and tried again
    later: on a busy machine a box may need longer to answer than another waits."""
    await pause(stopping, seconds)
    while not stopping.is_set():
        try:
            await work()
        except Exception as error:
            answer = getattr(error, "response", None)
            said = f"{error!r} {answer.text if answer is not None else ''}"
            failures.append(said if len(said) <= 500 else f"{said[:200]} ... {said[-300:]}")
        await pause(stopping, seconds)


class KeyChanges:
    """Creates, edits, rotates and revokes keys, those of clients among them."""

    def __init__(self, box: Box, tenants: list[Tenant]) -> None:
        self._box, self._tenants, self._dice = box, tenants, random.Random(1)
        self._spare: list[str] = []
        self.done: dict[str, int] = dict.fromkeys(("create", "edit", "rotate", "revoke"), 0)

    async def begin(self) -> None:
        for tenant in self._tenants:
            await asyncio.to_thread(self._give, tenant)

    async def change(self) -> None:
        await asyncio.to_thread(self._change)

    def _change(self) -> None:
        kind, tenant = self._dice.choice(list(self.done)), self._dice.choice(self._tenants)
        self.done[kind] += 1
        if kind == "create":
            self._spare.append(self._ask("", {"name": "spare"})["id"])
            if len(self._spare) > 8:
                self._ask(f"/{self._spare.pop(0)}/revoke")
        elif kind == "edit":
            weight = self._dice.choice([0.5, 1, 2])
            policy = {"weight": weight, "max_parallel": 4, "max_queue": 4}
            self._ask(f"/{tenant.key_id}", {"policy": policy}, "PATCH")
        elif kind == "rotate":
            overlap = {"overlap": self._dice.choice(OVERLAPS)}
            tenant.secret = self._ask(f"/{tenant.key_id}/rotate", overlap)["key"]
        else:
            old = tenant.key_id
            self._give(tenant)
            now = "?now=true" if self._dice.random() < 0.5 else ""
            self._ask(f"/{old}/revoke{now}")

    def _give(self, tenant: Tenant) -> None:
        made = self._ask("", {"name": f"client {tenant.number}"})
        tenant.key_id, tenant.secret = made["id"], made["key"]

    def _ask(self, path: str, body: Any = None, method: str = "POST") -> Any:
        answer = self._box.http(method, f"/v1/admin/keys{path}", json=body or {})
        answer.raise_for_status()
        return answer.json()


class PeerChanges:
    """`ben` is a member that stops and starts again; each `guest` is a box that never was there,
    joins, and is removed.  Both have the model FAR.

    `serving`: those that the box can send requests to, and since when; nobody is in it while it
    comes or goes.  `back_seconds`: how long ben was missed after each start.
    """

    def __init__(self, box: PeerBox, folder: Path, settings: str, model: str) -> None:
        self._box, self._folder, self._settings, self._model = box, folder, settings, model
        self.ben = self._new("ben")
        self.guest: PeerBox | None = None
        self.restarts = self.guests = 0
        self.serving: dict[str, float] = {}
        self.back_seconds: list[float] = []

    def _new(self, name: str) -> PeerBox:
        arguments = ("--model", f"{FAR}={self._model}")
        return PeerBox(self._folder / name, name, self._settings, *arguments)

    def begin(self) -> None:
        self._join(self.ben)

    def serves_since(self, moment: float) -> bool:
        """Whether one of them could serve requests from then until now."""
        return any(since <= moment for since in self.serving.values())

    def _join(self, other: PeerBox) -> None:
        other.start()
        ticket = self._box.admin("POST", "/invitations", {"name": other.name}).json()["ticket"]
        other.admin("POST", "", {"ticket": ticket}).raise_for_status()
        self._wait_for(other)

    def _wait_for(self, other: PeerBox) -> None:
        wait_until(lambda: self._offers(other), f"{other.name} is connected and offers {FAR}")
        self.serving[other.name] = time.monotonic()

    def _offers(self, other: PeerBox) -> bool:
        seen = self._box.sees(other.name)
        models = [model["id"] for model in seen["models"]] if seen else []
        return seen is not None and FAR in models and not seen["draining"]

    async def restart_ben(self) -> None:
        self.restarts += 1
        self.serving.pop("ben", None)
        await asyncio.to_thread(self.ben.stop, 90)
        await asyncio.sleep(AWAY_SECONDS)
        began = time.monotonic()
        await asyncio.to_thread(self.start_ben)
        self.back_seconds.append(round(time.monotonic() - began, 1))

    def start_ben(self) -> None:
        """Returns once the box can send requests to it."""
        self.ben.start()
        self._wait_for(self.ben)

    async def invite_guest(self) -> None:
        """It is killed in every second case, so that its peers notice by themselves."""
        self.guests += 1
        guest = self.guest = self._new(f"guest-{self.guests}")
        try:
            await asyncio.to_thread(self._join, guest)
            await asyncio.sleep(GUEST_SECONDS)
            self.serving.pop(guest.name)
            if self.guests % 2:
                await asyncio.to_thread(guest.kill)
            removed = await asyncio.to_thread(self._box.admin, "DELETE", f"/{guest.name}")
            removed.raise_for_status()
        finally:
            self.serving.pop(guest.name, None)
            await asyncio.to_thread(guest.end)
            self.guest = None
            shutil.rmtree(guest.home)

    def back(self) -> bool:
        """Whether ben is connected, and nobody else."""
        names = [name for name, one in self._box.listed().items() if one["state"] == "connected"]
        return names == [self.ben.name]

    def end(self) -> None:
        for one in (self.ben, self.guest):
            if one is not None and hasattr(one, "process"):
                one.end()


class Reloads:
    """SIGHUP, after a change of the configuration in every second case."""

    def __init__(self, box: Box) -> None:
        self._box, self.count = box, 0
        self._file = box.home / "config.toml"
        self._text = self._file.read_text()

    async def reload(self) -> None:
        self.count += 1
        price = f'[pricing]\nper_1k_tokens = "0.00{self.count % 9 + 1}"\n'
        if self.count % 2:
            self._file.write_text(self._text + price)
        self._box.process.send_signal(signal.SIGHUP)
