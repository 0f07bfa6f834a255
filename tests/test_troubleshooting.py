"""docs/troubleshooting.md: every error on the page is what the box really says."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from pinaivu_box.doctor import graphics, machine
from pinaivu_box.doctor.graphics import Seen
from pinaivu_box.store.keys import generate
from tests.support import gpu_machines
from tests.support.documents import blocks
from tests.support.in_process_command import make_key, run_command
from tests.support.model_shapes import SHAPES
from tests.support.ports import free_port
from tests.support.process_box import Box, StartBox, pinaivu, wait_until

PAGE = "docs/troubleshooting.md"
CONFIG = """
[server]
trusted_proxies = ["127.0.0.1"]
[engine]
drafting = false
max_queue = 1
[pricing]
per_1k_tokens = "1"
[[model]]
name = "llama3.2:1b"
path = "fake:0"
context = 256
[[model]]
name = "slow:1"
path = "fake:50"
context = 2048
parallel = 1
[[model]]
name = "qwen2.5:72b"
context = 100000000
"""
PEERING = '[peering]\nenabled = true\nhost = "127.0.0.1"\nport = {}\n'
USER = [{"role": "user", "content": "hi"}]
LONG = [{"role": "user", "content": "hi " * 400}]


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    home = tmp_path_factory.mktemp("trouble") / "home"
    (home / "models").mkdir(parents=True)
    (home / "config.toml").write_text(CONFIG)
    # A small file whose context takes more memory than any machine has.
    numbers = {**SHAPES["tiny"].numbers, "context_length": 100_000_000}
    shape = dataclasses.replace(SHAPES["tiny"], name="qwen2.5:72b", numbers=numbers)
    shape.write(home / "models")
    started = Box(home).start()
    yield started
    started.end()


class Trouble:
    """Asks a box, and notes what it says as the page writes it."""

    def __init__(self, box: Box) -> None:
        self.box = box
        self.said: list[str] = []

    def ask(self, method: str, path: str, key: str | None = None, **more: Any) -> None:
        answer = self.box.http(method, path, key=key, **more)
        error = answer.json()["error"]
        self.said.append(f"{answer.status_code} {error['code']}\n{error['message']}")

    def chat(self, key: str | None = None, headers: Any = None, **more: Any) -> None:
        body = {"model": "llama3.2:1b", "messages": USER, "max_tokens": 4, **more}
        self.ask("POST", "/v1/chat/completions", key, json=body, headers=headers or {})

    def key(self, *options: str) -> str:
        return make_key(self.box, *options)[0]

    def command(self, *args: str, home: Path) -> None:
        self.said.append(pinaivu(*args, home=home, check=False).stderr.strip())


def authentication(at: Trouble) -> None:
    at.ask("GET", "/v1/models", "")
    at.ask("GET", "/v1/models", "", headers={"Authorization": at.box.key})
    at.ask("GET", "/v1/models", at.box.key[:-1])
    at.ask("GET", "/v1/models", generate())
    revoked, revoked_id = make_key(at.box)
    run_command("keys", "revoke", revoked_id, "--now", home=at.box.home)
    at.ask("GET", "/v1/models", revoked)
    at.ask("GET", "/v1/models", at.key("--expires", "1ms"))
    blocked, blocked_id = make_key(at.box)
    at.ask("GET", "/v1/engines", blocked)
    run_command("keys", "edit", blocked_id, "--block", "ask Ann first", home=at.box.home)
    at.ask("GET", "/v1/models", blocked)
    at.chat(at.key("--model", "smollm2:*"))
    at.chat(at.key("--network", "10.0.0.0/8"))


def limits(at: Trouble) -> None:
    key = at.key("--rpm", "1")
    assert at.box.http(
        "POST", "/v1/tokenize", key=key, json={"model": "llama3.2:1b", "prompt": "x"}
    )
    at.chat(key)
    at.chat(at.key("--tpm", "100"), max_tokens=200)
    at.chat(at.key("--budget", "0.01 per 30d"))


def names_and_bodies(at: Trouble) -> None:
    at.chat(model="llama-3.2-1b")
    at.ask("POST", "/chat/completions", json={})
    at.ask("POST", "/v1/chat/completion", json={})
    at.ask("GET", "/v1/chat/completions")
    at.chat(messages=[{"role": "user"}])
    at.chat(temperature=-1)
    at.chat(temprature=1)
    at.chat(audio={"voice": "alloy", "format": "wav"})
    json_body = {"content-type": "application/json"}
    at.ask("POST", "/v1/chat/completions", content=b'{"model": ', headers=json_body)
    at.chat(messages=LONG)
    large = b'{"model": "' + b"x" * 11_000_000 + b'"}'
    at.ask("POST", "/v1/chat/completions", content=large, headers=json_body)
    at.ask("GET", "/v1/receipts/req_abc")
    far = {"x-forwarded-for": "203.0.113.9", "x-forwarded-proto": "http"}
    login = {"name": "owner", "password": "correct horse battery"}
    at.ask("POST", "/v1/session", "", json=login, headers=far)


def no_nodes(at: Trouble) -> None:
    at.ask("POST", "/v1/completions", json={"model": "qwen2.5:72b", "prompt": "hi"})
    at.chat(model="slow:1", headers={"x-request-timeout": "1ms"})
    asks = [threading.Thread(target=ask_until_it_ends, args=(at.box,)) for _ in range(2)]
    for number, ask in enumerate(asks):
        ask.start()
        wait_until(lambda n=number: running_and_waiting(at.box) > n, "a request is there")
    at.chat(model="slow:1")
    at.box.process.send_signal(signal.SIGTERM)
    wait_until(lambda: at.box.http("GET", "/readyz", key="").status_code == 503, "it stops")
    at.chat(model="slow:1")
    at.box.kill()
    for ask in asks:
        ask.join()


def ask_until_it_ends(box: Box) -> None:
    with contextlib.suppress(httpx.HTTPError):  # the box is killed meanwhile
        box.chat(model="slow:1", max_tokens=1000)


def running_and_waiting(box: Box) -> int:
    found = [engine for engine in box.engines() if engine["model"] == "slow:1"]
    return sum(engine["running"] + engine["waiting"] for engine in found)


def commands(at: Trouble, folder: Path) -> None:
    at.command("serve", "--port", "0", home=at.box.home)
    at.command("ps", home=folder / "empty")
    wrong = home_with(folder / "wrong", "[server]\nprot = 4001\n")
    at.command("serve", home=wrong)
    with socket.create_server(("127.0.0.1", 0)) as other:
        at.command("serve", "--port", str(other.getsockname()[1]), home=folder / "other")


def peers(at: Trouble, folder: Path) -> None:
    ann, ben = (home_with(folder / n, PEERING.format(free_port())) for n in ("ann", "ben"))
    ticket = re.search(r"pnv1\w+", pinaivu("peers", "invite", home=ann).stdout)
    assert ticket
    at.command("peers", "join", ticket[0], home=ben)
    at.command("peers", "join", "pnv1abc", home=ben)


def home_with(home: Path, config: str) -> Path:
    home.mkdir()
    (home / "config.toml").write_text(config)
    return home


def doctor(at: Trouble, folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine, "synchronised", lambda: False)
        clock = machine.clock(folder, 2e9)
    at.said.append(f"{clock.state}  {clock.name}  {clock.found}\n→ {clock.todo}")
    nvidia = gpu_machines.NVIDIA
    for name, driver, nodes in (
        ("bare", "", True), ("container", "580.65", False), ("old", "535.104", True),
        ("cpu build", "580.65", True),
    ):  # fmt: skip
        root = gpu_machines.machine(folder / name, nvidia, driver=driver, nodes=nodes)
        (found,) = graphics.judge(root, Seen())
        at.said.append(f"{found.found}\n→ {found.todo}")


@pytest.fixture(scope="module")
def said(box: Box, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """All errors that are provoked; the box is not there any more."""
    at, folder = Trouble(box), tmp_path_factory.mktemp("homes")
    authentication(at)
    limits(at)
    names_and_bodies(at)
    commands(at, folder)
    peers(at, folder)
    doctor(at, folder)
    no_nodes(at)
    return at.said


PRINTED = [block.text.strip() for block in blocks(PAGE) if block.language == "text"]


def is_said(printed: str, said: str) -> bool:
    """`…` on the page is any text of one line."""
    return re.fullmatch(re.escape(printed).replace("…", ".*"), said) is not None


@pytest.mark.parametrize("printed", PRINTED)
def test_what_the_page_prints_is_said(said: list[str], printed: str) -> None:
    assert any(is_said(printed, one) for one in said)


def test_what_is_said_is_on_the_page(said: list[str]) -> None:
    assert not [one for one in said if not any(is_said(printed, one) for printed in PRINTED)]


def test_an_error_as_json_is_that_of_the_page(module_box: StartBox) -> None:
    """The two blocks of JSON: the whole body of one error, and the path of another."""
    whole, path = (json.loads(block.text) for block in blocks(PAGE) if block.language == "json")
    box = module_box(config=CONFIG.partition('[[model]]\nname = "llama3.3')[0])
    assert box.http("GET", "/v1/models", key="").json() == whole
    body = {"model": "llama3.2:1b", "messages": [{"role": "user"}]}
    answer = box.http("POST", "/v1/chat/completions", json=body)
    assert answer.json()["detail"] == path["detail"]
    assert answer.headers["x-request-id"].startswith("req_")
    assert "request_id" not in answer.text
