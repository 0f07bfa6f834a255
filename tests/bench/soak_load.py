"""The clients of a soak, and what they are told."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx

from tests.bench.soak_measures import Answers, plain
from tests.support.process_box import Box

SYSTEM = "You are a helpful assistant who answers briefly. " * 4
WORDS = ("sea", "clock", "bread", "snow", "light", "bees", "map", "moon", "river", "stone", "wind")
FAR = "far:1"  # a model that peers alone have
TIMEOUT_SECONDS = 180.0
REQUEST_ID = "x-request-id"


@dataclass
class Tenant:
    """A client, and the key that it has at the moment.  A revoked key is replaced."""

    number: int
    key_id: str = ""
    secret: str = ""


@dataclass
class Clients:
    """`think` is the mean of the seconds between the end of a request and the client's next.
    `servable` says of a model and a moment whether somebody could serve it all the time since."""

    box: Box
    models: tuple[str, ...]
    think: float
    most_tokens: int
    tenants: list[Tenant]
    servable: Callable[[str, float], bool]
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
            model = dice.choices([*self.models, FAR], [0.43, 0.42, 0.15])[0]
            self.answers.sent += 1
            try:
                await _SoakRequest(self, http, tenant, dice, model).run()
            except Exception as error:  # whatever it is: the others go on
                self.answers.lost.append(f"{model}: {error!r}")
            await pause(self.stopping, min(dice.expovariate(1 / self.think), 4 * self.think))


class _SoakRequest:
    def __init__(
        self,
        clients: Clients,
        http: httpx.AsyncClient,
        tenant: Tenant,
        dice: random.Random,
        model: str,
    ) -> None:
        self._clients, self._http, self._dice, self._model = clients, http, dice, model
        self._answers, self._began = clients.answers, time.monotonic()
        self._headers = {"Authorization": f"Bearer {tenant.secret}"}
        if dice.random() < 0.3:
            self._headers["Connection"] = "close"

    async def run(self) -> None:
        kind, most = self._dice.random(), self._clients.most_tokens
        if kind < 0.70:
            await self._stream(chat(self._dice, self._model, most))
        elif kind < 0.90:
            await self._whole("/v1/chat/completions", chat(self._dice, self._model, most))
        else:
            body = {"model": self._model, "input": text(self._dice), "max_output_tokens": 8}
            await self._whole("/v1/responses", body)

    async def _stream(self, body: dict[str, Any]) -> None:
        leaves_after = self._dice.randrange(1, 20) if self._dice.random() < 0.12 else None
        async with self._http.stream(
            "POST", "/v1/chat/completions", json={**body, "stream": True}, headers=self._headers
        ) as got:
            if got.status_code != 200:
                self._refused(got.status_code, await got.aread())
                return
            request_id, chunks = got.headers[REQUEST_ID], 0
            async for line in got.aiter_lines():
                if line == "data: [DONE]":
                    self._answers.answered.add(request_id)
                    return
                if not line.startswith("data: "):
                    continue
                chunks += 1
                if error := json.loads(line.removeprefix("data: ")).get("error"):
                    self._answers.failed_ids.add(request_id)
                    self._not_served("ended with", str(error.get("code")), str(error["message"]))
                    return
                if chunks == leaves_after:
                    self._answers.cut.add(request_id)
                    return
        self._answers.lost.append(f"{request_id} has no end after {chunks} chunks")

    async def _whole(self, path: str, body: dict[str, Any]) -> None:
        leaves = self._dice.random() < 0.05
        try:
            async with asyncio.timeout(self._dice.uniform(0.02, 0.4) if leaves else None):
                got = await self._http.post(path, json=body, headers=self._headers)
        except TimeoutError:
            self._answers.cut_early += 1
            return
        if got.status_code == 200:
            self._answers.answered.add(got.headers[REQUEST_ID])
        else:
            self._refused(got.status_code, got.content)

    def _refused(self, status: int, content: bytes) -> None:
        error = json.loads(content)["error"]
        if status >= 500 and status != 503:
            self._answers.lost.append(f"{status}: {content[:200]!r}")
        else:
            self._not_served(str(status), str(error.get("code")), str(error["message"]))

    def _not_served(self, how: str, code: str, message: str) -> None:
        """A 503 is right if nobody could serve it; and what a key may not do is its own affair."""
        reason = f"{how} {code}: {plain(message)}"
        nobody = code == "no_nodes_available"
        if nobody and self._clients.servable(self._model, self._began):
            self._answers.turned_away[f"{self._model}: {reason}"] += 1
        else:
            self._answers.refused[reason] += 1


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
