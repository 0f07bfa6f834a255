"""The clients of a soak, and what changes while they ask: keys, peers, configuration."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import shutil
import signal
import subprocess
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from tests.bench.soak_measures import Answers
from tests.support.peer_box import PeerBox
from tests.support.process_box import Box, wait_until

SYSTEM = "You are a helpful assistant who answers briefly. " * 4
WORDS = ("sea", "clock", "bread", "snow", "light", "bees", "map", "moon", "river", "stone", "wind")
FAR = "far:1"  # a model that peers alone have
TIMEOUT_SECONDS = 180.0
REQUEST_ID = "x-request-id"
OVERLAPS = ("0", "10s", "1m")


@dataclass
class Tenant:
    """A client, and the key that it has at the moment.  A revoked key is replaced."""

    number: int
    key_id: str = ""
    secret: str = ""


@dataclass
class Clients:
    """`think` is the mean of the seconds between the end of a request and the client's next."""

    box: Box
    models: tuple[str, ...]
    think: float
    most_tokens: int
    tenants: list[Tenant]
    answers: Answers = field(default_factory=Answers)
    stopping: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self) -> None:
        limits = httpx.Limits(max_connections=256, max_keepalive_connections=32)
        async with httpx.AsyncClient(
            base_url=self.box.url, timeout=TIMEOUT_SECONDS, trust_env=False, limits=limits
        ) as http:
            await asyncio.gather(*(self._client(http, tenant) for tenant in self.tenants))

    async def _client(self, http: httpx.AsyncClient, tenant: Tenant) -> None:
        dice = random.Random(tenant.number)
        await pause(self.stopping, dice.uniform(0, self.think))
        while not self.stopping.is_set():
            await self._request(http, tenant, dice)
            await pause(self.stopping, min(dice.expovariate(1 / self.think), 4 * self.think))

    async def _request(self, http: httpx.AsyncClient, tenant: Tenant, dice: random.Random) -> None:
        headers = {"Authorization": f"Bearer {tenant.secret}"}
        if dice.random() < 0.3:
            headers["Connection"] = "close"
        model = dice.choices([*self.models, FAR], [0.43, 0.42, 0.15])[0]
        self.answers.sent += 1
        kind = dice.random()
        try:
            if kind < 0.70:
                await self._stream(http, headers, chat(dice, model, self.most_tokens), dice)
            elif kind < 0.90:
                body = chat(dice, model, self.most_tokens)
                await self._whole(http, headers, "/v1/chat/completions", body, dice)
            else:
                body = {"model": model, "input": text(dice), "max_output_tokens": 8}
                await self._whole(http, headers, "/v1/responses", body, dice)
        except httpx.HTTPError as error:
            self.answers.lost.append(f"{type(error).__name__}: {error}")

    async def _stream(
        self, http: httpx.AsyncClient, headers: Any, body: Any, dice: random.Random
    ) -> None:
        leaves_after = dice.randrange(1, 20) if dice.random() < 0.12 else None
        async with http.stream(
            "POST", "/v1/chat/completions", json={**body, "stream": True}, headers=headers
        ) as got:
            if got.status_code != 200:
                self._refused(got.status_code, await got.aread())
                return
            request_id, chunks = got.headers[REQUEST_ID], 0
            async for line in got.aiter_lines():
                if line == "data: [DONE]":
                    self.answers.answered.add(request_id)
                    return
                if not line.startswith("data: "):
                    continue
                chunks += 1
                if error := json.loads(line.removeprefix("data: ")).get("error"):
                    self.answers.failed[str(error.get("code"))] += 1
                    self.answers.failed_ids.add(request_id)
                    return
                if chunks == leaves_after:
                    self.answers.cut.add(request_id)
                    return
        self.answers.lost.append(f"{request_id} has no end after {chunks} chunks")

    async def _whole(
        self, http: httpx.AsyncClient, headers: Any, path: str, body: Any, dice: random.Random
    ) -> None:
        leaves = dice.random() < 0.05
        try:
            async with asyncio.timeout(dice.uniform(0.02, 0.4) if leaves else TIMEOUT_SECONDS):
                got = await http.post(path, json=body, headers=headers)
        except TimeoutError:
            if leaves:
                self.answers.cut_early += 1
            else:
                self.answers.lost.append("no answer in time")
            return
        if got.status_code == 200:
            self.answers.answered.add(got.headers[REQUEST_ID])
        else:
            self._refused(got.status_code, got.content)

    def _refused(self, status: int, content: bytes) -> None:
        code = json.loads(content)["error"].get("code")
        reason = f"{status} {code}"
        if status >= 500 and status != 503:
            self.answers.lost.append(f"{reason}: {content[:200]!r}")
        else:
            self.answers.refused[reason] += 1


def text(dice: random.Random) -> str:
    return " ".join(dice.choices(WORDS, k=dice.randrange(4, 40)))


def chat(dice: random.Random, model: str, most: int) -> dict[str, Any]:
    messages = [{"role": "user", "content": text(dice)}]
    if dice.random() < 0.3:
        messages.insert(0, {"role": "system", "content": SYSTEM})
    tokens = dice.randrange(4, most + 1)
    return {"model": model, "messages": messages, "max_tokens": tokens, "ignore_eos": True}


async def pause(stopping: asyncio.Event, seconds: float) -> None:
    """Shorter if it is to stop."""
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(stopping.wait(), seconds)


async def every(
    stopping: asyncio.Event,
    seconds: float,
    work: Callable[[], Awaitable[object]],
    failures: list[str],
) -> None:
    """Until it is to stop; what is begun is finished.  What fails is noted, and tried again later:
    on a busy machine a box may need longer to answer than another waits."""
    await pause(stopping, seconds)
    while not stopping.is_set():
        try:
            await work()
        except (httpx.HTTPError, AssertionError, OSError, subprocess.SubprocessError) as error:
            answer = getattr(error, "response", None)
            failures.append(f"{error!r} {answer.text if answer is not None else ''}"[:500])
        await pause(stopping, seconds)


# -- keys ------------------------------------------------------------------------------------------


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


# -- peers -----------------------------------------------------------------------------------------


class PeerChanges:
    """`ben` is a member that stops and starts again; each `guest` is a box that never was there,
    joins, and is removed."""

    def __init__(self, box: PeerBox, folder: Path, settings: str, model: str) -> None:
        self._box, self._folder, self._settings, self._model = box, folder, settings, model
        self.ben = self._new("ben")
        self.guest: PeerBox | None = None
        self.restarts = self.guests = 0

    def _new(self, name: str) -> PeerBox:
        arguments = ("--model", f"{FAR}={self._model}")
        return PeerBox(self._folder / name, name, self._settings, *arguments)

    def begin(self) -> None:
        self._join(self.ben)

    def _join(self, other: PeerBox) -> None:
        other.start()
        ticket = self._box.admin("POST", "/invitations", {"name": other.name}).json()["ticket"]
        other.admin("POST", "", {"ticket": ticket}).raise_for_status()
        wait_until(lambda: self._box.sees(other.name), f"{other.name} is connected")

    async def restart_ben(self) -> None:
        self.restarts += 1
        await asyncio.to_thread(self.ben.stop, 90)
        await asyncio.sleep(15)
        await asyncio.to_thread(self.ben.start)

    async def invite_guest(self) -> None:
        """It is killed in every second case, so that its peers notice by themselves."""
        self.guests += 1
        guest = self.guest = self._new(f"guest-{self.guests}")
        try:
            await asyncio.to_thread(self._join, guest)
            await asyncio.sleep(45)
            if self.guests % 2:
                await asyncio.to_thread(guest.kill)
            removed = await asyncio.to_thread(self._box.admin, "DELETE", f"/{guest.name}")
            removed.raise_for_status()
        finally:
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


# -- the configuration -----------------------------------------------------------------------------


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
