"""A whole box of this process with its API, linked in memory."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import httpx

from pinaivu_box import config
from pinaivu_box.box import Box
from pinaivu_box.box_services import open_box
from pinaivu_box.config import ModelConfig
from pinaivu_box.identity import Identity
from pinaivu_box.policy import SCOPES, Policy
from pinaivu_box.server.app import create_app
from pinaivu_box.store import accounts
from pinaivu_box.store.audit import Actor
from pinaivu_box.store.new_keys import Draft, create
from pinaivu_box.transport.iroh_transport import IrohTransport
from pinaivu_box.transport.transport import Transport
from tests.support.fake_model import FAKE
from tests.support.fake_peer import FakePeer
from tests.support.memory_transport import MemoryNetwork, MemoryTransport
from tests.support.pages import PASSWORD

_TEST = Actor("test", "local")


class InProcessBox:
    """A whole box, with its API."""

    def __init__(self, box: Box, secret: str) -> None:
        self.box, self.secret = box, secret
        assert box.peer_services is not None and box.network is not None
        self.pool, self.network, self.node_id = box.peer_services, box.network, box.identity.node_id
        self._app = httpx.ASGITransport(create_app(box))
        self._cookies: dict[str, str] = {}

    async def http(self, method: str, path: str, **more: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {more.pop('secret', self.secret)}"}
        async with httpx.AsyncClient(transport=self._app, base_url="http://box", timeout=60) as one:
            return await one.request(method, path, headers=headers, **more)

    async def page(self, path: str) -> str:
        """A page as its owner sees it, who is an admin."""
        async with httpx.AsyncClient(transport=self._app, base_url="http://127.0.0.1") as one:
            if not self._cookies:
                owner = await accounts.find(self.box.database, "owner")
                await accounts.set_password(self.box.database, owner, PASSWORD, _TEST)
                login = {"name": "owner", "password": PASSWORD}
                answer = await one.post("/v1/session", json=login)
                assert answer.status_code == 200, answer.text
                self._cookies = dict(answer.cookies)
            one.cookies.update(self._cookies)
            answer = await one.get(path, headers={"accept": "text/html"})
        assert answer.status_code == 200, answer.text
        return answer.text

    async def chat(
        self, text: str = "Hello", secret: str | None = None, **more: Any
    ) -> httpx.Response:
        body = {"model": FAKE, "messages": [{"role": "user", "content": text}], "max_tokens": 20}
        return await self.http(
            "POST",
            "/v1/chat/completions",
            json={**body, **more},
            secret=secret or self.secret,
        )

    async def entries(self, peer: FakePeer) -> list[Any]:
        """Of its ledger."""
        return await self.box.database.read(
            "SELECT * FROM ledger_entries WHERE peer = ?", (peer.identity.node_id,)
        )

    def forget(self) -> None:
        """What it thinks of others, as if nothing had happened."""
        breaker: Any = self.pool.boxes.breaker
        self.pool.reputation.opinions.clear()
        self.pool.reputation.changed.clear()  # or the next save, a minute on, looks for them
        candidates: Any = self.pool.candidates
        for kept in (breaker._failures, candidates._conversations, candidates._states):
            kept.clear()


@contextlib.asynccontextmanager
async def in_process_box(
    net: MemoryNetwork, home: Path, models: tuple[str | ModelConfig, ...] = (), **settings: Any
) -> AsyncIterator[InProcessBox]:
    """A name alone is that of a fake model; `settings` as "section__name"."""

    async def bind(identity: Identity, *_: object) -> Transport:
        return MemoryTransport(net, identity.node_id, None, f"at:{home.name}")

    overrides: dict[tuple[str, ...], Any] = {
        ("peering", "enabled"): True,
        ("peering", "name"): home.name,
    }
    overrides |= {tuple(name.split("__")): value for name, value in settings.items()}
    extra = [
        ModelConfig(name=model, path="fake:1") if isinstance(model, str) else model
        for model in models
    ]
    load = partial(config.load, None, environ={}, overrides=overrides, extra_models=extra)
    with patch.object(IrohTransport, "bind", bind):
        async with open_box(load, home) as box:
            draft = Draft("one", accounts.OWNER, Policy(scopes=SCOPES))
            _, secret = await create(box.database, draft, _TEST)
            yield InProcessBox(box, secret)


def count_offers(box: InProcessBox) -> int:
    return sum(one.id == FAKE for _, one in box.pool.candidates._offers())
