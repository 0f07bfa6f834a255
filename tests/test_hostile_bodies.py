"""No body stops the loop: whoever else is served goes on, and what is refused has its price.

What decodes large bodies is stopped here (SIGSTOP) while others are served, so nothing depends on
how fast anything is.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.expensive_bodies import BODIES, CHAT, EMBEDDINGS, Body
from tests.support.process_box import Box, StartBox, wait_until
from tests.support.streamed_chat import StreamedChat

MODEL = "slow:1"
CONFIG = f"""
[engine]
drafting = false
[[model]]
name = "{MODEL}"
path = "fake:5"
context = 200000
"""
LARGE = "word " * 20_000  # 100 kB: decoded elsewhere
CHUNKS = 10  # that somebody else gets meanwhile


@pytest.fixture(scope="module")
def box(module_box: StartBox) -> Box:
    return module_box(config=CONFIG)


def make_key(box: Box, **policy: int) -> str:
    """Of an account of its own."""
    token = json.loads((box.home / "run.json").read_text())["token"]
    made = box.http("POST", "/v1/admin/keys", key=token, json={"policy": policy})
    secret: str = made.json()["key"]
    return secret


def send(box: Box, key: str, path: str, content: bytes) -> httpx.Response:
    headers = {"content-type": "application/json"}
    return box.http("POST", path, key=key, content=content, headers=headers)


def ask(box: Box, key: str, text: str = "hi", path: str = CHAT, **more: Any) -> httpx.Response:
    body = {"model": MODEL, "messages": [{"role": "user", "content": text}], "max_tokens": 2}
    return send(box, key, path, json.dumps({**body, **more}).encode())


@pytest.fixture(scope="module")
def listener(box: Box) -> Iterator[StreamedChat]:
    """A second tenant's stream."""
    stream = StreamedChat(box, MODEL, 100_000, key=make_key(box))
    wait_for_chunks(stream)
    yield stream
    stream.leave()


def wait_for_chunks(stream: StreamedChat, refused: Future[httpx.Response] | None = None) -> None:
    """Wait for CHUNKS more of the stream; before `refused` is there."""
    wanted = len(stream.chunks) + CHUNKS
    wait_until(lambda: len(stream.chunks) >= wanted, "chunks of another stream")
    assert not stream.error
    assert refused is None or not refused.done()


@pytest.fixture(scope="module")
def hostile(box: Box) -> str:
    return make_key(box)


def of_kind(box: Box, kind: str) -> list[int]:
    """The box's children that were started by that command."""
    found = []
    for task in Path(f"/proc/{box.process.pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            command = Path(f"/proc/{child}/cmdline").read_bytes().rstrip(b"\0").split(b"\0")
            if command[-1] == kind.encode():
                found.append(int(child))
    return found


@contextmanager
def still(box: Box, kind: str) -> Iterator[None]:
    """Children of that kind stand still."""
    pids = of_kind(box, kind)
    assert pids
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


@pytest.fixture(scope="module")
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(16) as pool:
        yield pool


@pytest.mark.parametrize("body", BODIES, ids=lambda body: body.name)
def test_others_go_on_while_a_body_is_decoded(
    box: Box, listener: StreamedChat, hostile: str, threads: ThreadPoolExecutor, body: Body
) -> None:
    """It cannot be answered while the process that decodes stands still, and they are served."""
    content = body.make(MODEL)
    if not of_kind(box, "sandbox"):  # the last one had reached a limit
        assert ask(box, hostile, LARGE).status_code == 200
    with still(box, "sandbox"):
        answer = threads.submit(send, box, hostile, body.path, content)
        wait_for_chunks(listener, answer)
    refused = answer.result()
    assert refused.status_code in body.statuses, refused.text[:500]
    assert len(refused.content) < 3000
    if refused.status_code >= 400:
        error = refused.json()["error"]
        assert len(error["message"]) < 500 and error["message"].isprintable()
        assert len(error["param"] or "") < 200


def test_large_bodies_that_are_right_are_served(box: Box, hostile: str) -> None:
    """As if they were small; tokens and many inputs as well as text."""
    answer = ask(box, hostile, LARGE, stop=["zzz"], metadata={"a": "b"})
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["prompt_tokens"] > len(LARGE)
    receipt = box.http("GET", f"/v1/receipts/{answer.json()['request_id']}", key=hostile)
    assert receipt.status_code == 200
    tokens = [list(range(200))] * 2048
    vectors = send(box, hostile, EMBEDDINGS, json.dumps({"model": MODEL, "input": tokens}).encode())
    assert vectors.status_code == 200 and len(vectors.json()["data"]) == 2048
    assert vectors.json()["usage"]["prompt_tokens"] == 200 * 2048


def test_a_tenant_s_large_bodies_do_not_hold_up_another_s(
    box: Box, hostile: str, threads: ThreadPoolExecutor
) -> None:
    """The engine stands still, so the room that they take is taken; who has too much waits."""
    other = make_key(box)
    ask(box, hostile, LARGE)
    text = json.dumps({"model": MODEL, "text": "a" * 9_000_000}).encode()
    with still(box, "engine"):
        floods = [threads.submit(send, box, hostile, "/v1/tokenize", text) for _ in range(8)]
        refused = send(box, other, CHAT, BODIES[3].make(MODEL))
        assert refused.status_code == 413
        assert not any(one.done() for one in floods)
    assert {one.result().status_code for one in floods} == {422}


# -- requests per minute ---------------------------------------------------------------------------


def test_a_refused_request_counts_as_a_request(box: Box) -> None:
    """Also the large ones, before anything is decoded once there are no more."""
    key = make_key(box, rpm=6)
    refused = [
        send(box, key, CHAT, b"{"),
        ask(box, key, model="nothing:1"),
        ask(box, key, temperature=9),
        ask(box, key, LARGE, temperature=9),
        ask(box, key, "a" * 250_000),
    ]
    assert [one.status_code for one in refused] == [400, 404, 422, 422, 400]
    left = [one.headers["x-ratelimit-remaining-requests"] for one in refused]
    assert left == ["5", "4", "3", "2", "1"]
    assert ask(box, key).status_code == 200
    with still(box, "sandbox"):
        late = ask(box, key, LARGE)
        assert late.status_code == 429 and late.json()["error"]["code"] == "rate_limit_exceeded"
        assert late.headers["x-ratelimit-remaining-requests"] == "0"
        assert int(late.headers["retry-after"]) >= 1


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/tokenize", {"text": "hi"}),
        ("/v1/detokenize", {"tokens": [104, 105]}),
        ("/v1/chat/completions/input_tokens", {"messages": [{"role": "user", "content": "hi"}]}),
        ("/v1/messages/count_tokens", {"messages": [{"role": "user", "content": "hi"}]}),
    ],
)
def test_counting_tokens_counts_as_a_request(box: Box, path: str, body: dict[str, Any]) -> None:
    """But not as tokens."""
    key = make_key(box, rpm=2, tpm=1000)
    data = json.dumps({"model": MODEL, **body}).encode()
    answers = [send(box, key, path, data) for _ in range(3)]
    assert [one.status_code for one in answers] == [200, 200, 429]
    assert answers[1].headers["x-ratelimit-remaining-tokens"] == "1000"
    assert ask(box, key).status_code == 429


def test_a_request_that_is_told_to_wait_has_used_nothing(box: Box) -> None:
    """A request that its tokens per minute stop takes none of the requests."""
    key = make_key(box, rpm=5, tpm=200)
    assert ask(box, key, max_tokens=100).status_code == 200
    for _ in range(8):
        late = ask(box, key, max_tokens=100)
        assert late.status_code == 429 and "tpm" in late.json()["error"]["message"]
        assert late.headers["x-ratelimit-remaining-requests"] == "4"


# -- in the engine ---------------------------------------------------------------------------------


def test_a_count_is_not_bounded_by_the_context(box: Box, hostile: str) -> None:
    text = "a" * 1_000_000
    counted = ask(box, hostile, text, CHAT + "/input_tokens")
    assert counted.status_code == 200 and counted.json()["input_tokens"] > len(text)
    listed = send(
        box, hostile, "/v1/tokenize", json.dumps({"model": MODEL, "text": "a" * 200_000}).encode()
    )
    assert listed.status_code == 200 and listed.json()["tokens"] == [97] * 200_000
