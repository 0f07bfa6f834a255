"""A running box whose upstreams change with each test: each has a server and a name of its own."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from tests.support.process_box import Box, wait_until
from tests.support.vllm_server import MODEL, VllmServer, vllm_server

CONFIG = """
[pricing]
per_1k_tokens = "1"
[[model]]
name = "both:1"
path = "fake:0"
"""
_numbers = itertools.count(1)


class UpstreamBox(Box):
    """`settings` of an upstream are those of `[[upstream]]`; without `models` it serves all."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder / "home", "--log-level", "debug")
        self.home.mkdir()
        self._config = self.home / "config.toml"
        self._config.write_text(CONFIG)
        self.key_file = folder / "key"
        self.key_file.write_text("sk-of-the-upstream\n")
        self.key_file.chmod(0o600)
        self.start()

    @contextmanager
    def upstream(self, **settings: Any) -> Iterator[VllmServer]:
        with vllm_server() as server:
            self.use(server, **settings)
            yield server

    def use(self, *servers: VllmServer, aliases: str = "", **settings: Any) -> list[str]:
        """From now on these are its upstreams; their names."""
        names = [f"cluster-{next(_numbers)}" for _ in servers]
        tables = [
            "\n".join([
                "[[upstream]]",
                *(f"{name} = {toml(value)}" for name, value in
                  {"name": each, "url": server.url, **settings}.items()),
            ])
            for each, server in zip(names, servers, strict=True)
        ]  # fmt: skip
        self._config.write_text("\n".join([CONFIG, aliases, *tables]))
        assert self.http("POST", "/v1/admin/reload").status_code == 200
        wait_until(
            lambda: all(each["state"] == "down" or each["models"] for each in self.upstreams()),
            "the upstreams to say which models they have",
        )
        return names

    def upstreams(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.http("GET", "/v1/admin/upstreams").json()["data"]
        return found

    def chat(self, text: str = "Why?", *, key: str | None = None, **more: Any) -> httpx.Response:
        body = {"model": MODEL, "messages": [{"role": "user", "content": text}], **more}
        return self.http("POST", "/v1/chat/completions", key=key, json=body)

    def new_key(self, **policy: Any) -> dict[str, Any]:
        body = {"account": "owner", "policy": policy}
        made = self.http("POST", "/v1/admin/keys", json=body)
        assert made.status_code == 200, made.text
        found: dict[str, Any] = made.json()
        return found

    def receipt(self, request_id: str) -> httpx.Response:
        return self.http("GET", f"/v1/receipts/{request_id}")

    def legs(self, request_id: str) -> list[dict[str, Any]]:
        """What was signed of each leg."""
        signed = json.loads(self.receipt(request_id).json()["signed_receipt"])
        return [json.loads(proof["signed"]) for proof in signed["proofs"]]


def toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f'"{name}" = {toml(each)}' for name, each in value.items()) + " }"
    return json.dumps(value)


def events(response: httpx.Response) -> list[Any]:
    """The data of each event of a stream but its end."""
    lines = [line for line in response.text.splitlines() if line.startswith("data: ")]
    return [json.loads(line[6:]) for line in lines if line != "data: [DONE]"]
