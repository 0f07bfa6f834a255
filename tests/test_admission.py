"""Between a request's arrival and its start: what changes meanwhile counts.

The prompts of a key with `--tpm` are counted before they are admitted.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.in_process_command import make_key, run_command, run_command_json
from tests.support.process_box import Box, wait_until
from tests.support.waiting import DEADLINE

CONFIG = """
[engine]
drafting = false
max_sequences = 1
max_queue = 2
[[model]]
name = "slow:1"
path = "fake:10"
context = 4096
"""
ASK = {"model": "slow:1", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}


@pytest.fixture
def box(tmp_path: Path) -> Iterator[Box]:
    (tmp_path / "box.toml").write_text(CONFIG)
    started = Box(tmp_path / "home", "--config", str(tmp_path / "box.toml")).start()
    yield started
    started.end()


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(32) as pool:
        yield pool


def ask(box: Box, key: str, **more: Any) -> httpx.Response:
    headers = more.pop("headers", {})
    body = {**ASK, **more}
    return box.http("POST", "/v1/chat/completions", key=key, json=body, headers=headers)


def code(answer: httpx.Response) -> str:
    found: str = answer.json()["error"]["code"]
    return found


@contextmanager
def still(box: Box) -> Iterator[int]:
    """The engine stands still: what asks it anything waits.  Its process id."""
    assert ask(box, box.key).status_code == 200
    (engine,) = box.engines()
    os.kill(engine["pid"], signal.SIGSTOP)
    try:
        yield engine["pid"]
    finally:
        with suppress(ProcessLookupError):
            os.kill(engine["pid"], signal.SIGCONT)


def counted(box: Box) -> bool:
    return str(box.engines()[0]["state"]) == "running"


def test_the_queue_is_bounded_for_requests_whose_prompts_are_counted_at_once(
    box: Box, threads: ThreadPoolExecutor
) -> None:
    key, _ = make_key(box, "--tpm", "100000")
    with still(box):
        asked = [threads.submit(ask, box, key, max_tokens=400) for _ in range(20)]
        wait_until(lambda: counted(box), "a prompt to be counted")
        time.sleep(1)  # the others too
    statuses = [one.result().status_code for one in asked]
    assert statuses.count(200) == 3 and statuses.count(503) == 17


def test_a_deadline_holds_while_the_prompt_is_counted(
    box: Box, threads: ThreadPoolExecutor
) -> None:
    key, _ = make_key(box, "--tpm", "1000")
    with still(box):
        late = threads.submit(ask, box, key, headers={"x-request-timeout": "0.3"})
        refused = late.result()
    assert refused.status_code == 503 and code(refused) == "deadline_exceeded"
    assert "within 0.3 s" in refused.json()["detail"]
    left = ask(box, key)
    assert left.status_code == 200
    taken = left.json()["usage"]["total_tokens"]
    assert int(left.headers["x-ratelimit-remaining-tokens"]) == 1000 - taken


def test_an_engine_that_dies_while_it_counts_a_prompt_is_replaced(
    box: Box, threads: ThreadPoolExecutor
) -> None:
    key, _ = make_key(box, "--tpm", "1000")
    with still(box) as engine:
        asked = threads.submit(ask, box, key)
        wait_until(lambda: counted(box), "a prompt to be counted")
        os.kill(engine, signal.SIGKILL)
        assert asked.result().status_code == 200


@pytest.mark.parametrize("command", [["revoke"], ["edit", "--block", "enough"]])
def test_a_key_that_is_stopped_while_a_prompt_is_counted_is_refused(
    box: Box, threads: ThreadPoolExecutor, command: list[str]
) -> None:
    key, name = make_key(box, "--tpm", "1000")
    with still(box):
        asked = threads.submit(ask, box, key)
        wait_until(lambda: counted(box), "a prompt to be counted")
        run_command("keys", *command, name, "--now", home=box.home)
    assert asked.result().status_code in (401, 403)


def test_a_key_that_is_revoked_while_the_body_arrives_is_refused(box: Box) -> None:
    key, name = make_key(box)
    body = httpx.Request("POST", box.url, json=ASK).content
    host, _, port = box.url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port))) as connection:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {key}"
        head += f"\r\nContent-Length: {len(body)}\r\nExpect: 100-continue\r\n\r\n"
        connection.sendall(head.encode())
        assert b"100" in connection.recv(100)  # the key has been found, the body is awaited
        connection.sendall(body[:9])
        run_command("keys", "revoke", name, home=box.home)
        connection.sendall(body[9:])
        assert b" 401 " in connection.recv(1000).splitlines()[0]


def test_draining_refuses_requests_whose_prompt_is_being_counted(
    box: Box, threads: ThreadPoolExecutor
) -> None:
    key, _ = make_key(box, "--tpm", "100000")
    with still(box):
        asked = threads.submit(ask, box, key, max_tokens=2000)
        wait_until(lambda: counted(box), "a prompt to be counted")
        box.process.send_signal(signal.SIGTERM)
        refused = asked.result()
    assert refused.status_code == 503 and "shutting down" in refused.json()["detail"]
    assert box.process.wait(DEADLINE) == 0


def test_a_request_refused_or_left_before_it_began_costs_nothing(
    box: Box, threads: ThreadPoolExecutor
) -> None:
    key, name = make_key(box, "--tpm", "5000")
    running = threads.submit(ask, box, box.key, max_tokens=3000)
    wait_until(lambda: box.engines() and box.engines()[0]["running"], "a run")
    refused = ask(box, key, headers={"x-request-timeout": "0.2"})
    assert refused.status_code == 503 and code(refused) == "deadline_exceeded"
    host, _, port = box.url.removeprefix("http://").partition(":")
    body = httpx.Request("POST", box.url, json=ASK).content
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {key}\r\n"
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        wait_until(lambda: box.engines()[0]["waiting"], "it waits for its turn")
    wait_until(lambda: "status=499" in box.errors, "the box to see that it left")
    assert not running.done()
    told = run_command_json("keys", "show", name, home=box.home)
    assert (told["requests"], told["tokens"]) == (0, 0)
    listed = box.http("GET", "/v1/models", key=key)
    assert listed.headers["x-ratelimit-remaining-tokens"] == "5000"
    box.kill()


def test_headers_count_the_last_minute_right_after_a_restart(box: Box) -> None:
    key, _ = make_key(box, "--rpm", "5")
    assert ask(box, key).headers["x-ratelimit-remaining-requests"] == "4"
    assert box.stop() == 0
    box.start()
    listed = box.http("GET", "/v1/models", key=key)
    assert listed.headers["x-ratelimit-remaining-requests"] == "4"
