"""A box whose database cannot be written: it says so, computes nothing, and loses nothing."""

from __future__ import annotations

import json
import resource
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.process_box import UNDRAFTED, Box, StartBox, wait_until

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def here(module_box: StartBox) -> Box:
    models = ("--model", "fake:1=fake:0", "--model", "slow:1=fake:10")
    started = module_box(*models, config=UNDRAFTED)
    for model in ("fake:1", "slow:1"):  # their engines run
        assert ask(started, model=model).status_code == 200
    return started


def ask(box: Box, **more: Any) -> httpx.Response:
    body = {"model": "fake:1", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
    return box.http("POST", CHAT, json={**body, **more})


@contextmanager
def full(box: Box) -> Iterator[None]:
    """As on a full disk, no file of the box can grow."""
    _, most = resource.prlimit(box.process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(box.process.pid, resource.RLIMIT_FSIZE, (0, most))
    try:
        yield
    finally:
        resource.prlimit(box.process.pid, resource.RLIMIT_FSIZE, (most, most))


@contextmanager
def locked(box: Box) -> Iterator[None]:
    """Another program holds the database's lock."""
    with closing(sqlite3.connect(box.home / "pinaivu.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield
        other.execute("ROLLBACK")


def ready(box: Box) -> bool:
    return box.http("GET", "/readyz").status_code == 200


def computed(box: Box) -> float:
    """Tokens, by all engines."""
    lines = box.http("GET", "/metrics").text.splitlines()
    found = [line for line in lines if "tokens_computed" in line and not line.startswith("#")]
    assert len(found) == 2
    return sum(float(line.split()[-1]) for line in found)


@pytest.mark.parametrize("trouble", [full, locked])
def test_it_says_so_and_computes_nothing_until_it_can_be_written_again(
    here: Box, trouble: Any
) -> None:
    wait_until(lambda: ready(here), "the box to be ready")
    with trouble(here):
        writing = threading.Thread(target=ask, args=(here,))  # waits for the lock, or for nothing
        writing.start()
        wait_until(lambda: not ready(here), "/readyz to say that nothing can be written")
        said = here.http("GET", "/readyz")
        assert said.status_code == 503 and "Retry-After" in said.headers
        assert "nothing can be written to the database" in said.json()["reason"]
        assert here.http("GET", "/health").status_code == 200
        before = computed(here)
        for path, body in (
            (CHAT, {"model": "fake:1", "messages": [{"role": "user", "content": "x"}]}),
            ("/v1/responses", {"model": "fake:1", "input": "x"}),
            ("/v1/completions", {"model": "fake:1", "prompt": "x"}),
            ("/v1/messages", {"model": "fake:1", "max_tokens": 5,
                              "messages": [{"role": "user", "content": "x"}]}),
            (CHAT, {"model": "fake:1", "messages": [{"role": "user", "content": "x"}],
                    "stream": True}),
        ):  # fmt: skip
            refused = here.http("POST", path, json=body)
            assert refused.status_code == 503, refused.text
            assert int(refused.headers["Retry-After"]) > 0
            assert "serves nothing now" in refused.json()["error"]["message"]
        assert computed(here) == before
    wait_until(lambda: ready(here), "the box to be ready again")
    writing.join()
    answer = ask(here)
    assert answer.status_code == 200
    assert here.http("GET", f"/v1/receipts/{answer.json()['request_id']}").status_code == 200


def test_a_completed_answer_has_its_receipt_although_the_disk_was_full(here: Box) -> None:
    """Streams of different lengths, in the middle of which the disk is full."""
    wait_until(lambda: ready(here), "the box to be ready")
    told: list[str] = []
    cut: list[str] = []
    begun = threading.Semaphore(0)

    def stream(tokens: int) -> None:
        body = {"model": "slow:1", "messages": [{"role": "user", "content": f"{tokens}"}],
                "max_tokens": tokens, "stream": True}  # fmt: skip
        headers = {"Authorization": f"Bearer {here.key}"}
        url, number, ended = here.url + CHAT, "", False
        with httpx.stream("POST", url, json=body, headers=headers, timeout=300,
                          trust_env=False) as answer:  # fmt: skip
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    chunk = json.loads(line[6:])
                    number = chunk.get("request_id", number)
                    begun.release()
                ended |= line == "data: [DONE]"
        (told if ended and "error" not in chunk else cut).append(number)

    threads = [threading.Thread(target=stream, args=(20 * n,)) for n in range(1, 13)]
    for one in threads:
        one.start()
    wait_until(lambda: len(told) >= 3, "some streams to be complete")
    with full(here):
        for one in threads:
            one.join()
    wait_until(lambda: ready(here), "the box to be ready again")
    assert told and cut
    for number in told:
        assert here.http("GET", f"/v1/receipts/{number}").status_code == 200, number
    for number in cut:
        assert here.http("GET", f"/v1/receipts/{number}").status_code == 404, number


def test_a_home_is_as_it_was(here: Box) -> None:
    with closing(sqlite3.connect(Path(here.home) / "pinaivu.db")) as found:
        assert found.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_the_end_of_a_response_in_the_background_waits_until_it_can_be_written(here: Box) -> None:
    wait_until(lambda: ready(here), "the box to be ready")
    responses = here.client.responses
    made = responses.create(model="slow:1", input="hi", max_output_tokens=300, background=True)
    with full(here):
        wait_until(lambda: len(responses.retrieve(made.id).output_text) == 300, "all of its text")
        wait_until(lambda: not ready(here), "its end")
        assert responses.retrieve(made.id).status == "in_progress"
    wait_until(lambda: responses.retrieve(made.id).status == "failed", "it to be written")
    assert list(responses.retrieve(made.id, stream=True))[-1].type == "response.failed"


def test_a_deletion_on_a_full_disk_is_503(here: Box) -> None:
    wait_until(lambda: ready(here), "the box to be ready")
    made = here.client.responses.create(model="fake:1", input="hi", max_output_tokens=2)
    path = f"/v1/responses/{made.id}"
    with full(here):
        refused = here.http("DELETE", path)
        assert refused.status_code == 503 and "database" in refused.json()["error"]["message"]
    wait_until(lambda: ready(here), "the box to be ready")
    assert here.http("DELETE", path).status_code == 200
