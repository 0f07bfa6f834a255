"""A real llama-server as an upstream, where one is: `LLAMA_SERVER` in the environment names it, or
it is in PATH.  It runs the bundled model, which the box has under its own name as well."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from pinaivu_box.models import bundled
from pinaivu_box.receipts.verify import Transcript, verify_receipt
from tests.support.ports import free_port
from tests.support.process_box import MODEL as HERE
from tests.support.process_box import wait_until
from tests.support.upstream_box import UpstreamBox, events

PROGRAM = os.environ.get("LLAMA_SERVER") or shutil.which("llama-server")
pytestmark = pytest.mark.skipif(PROGRAM is None, reason="there is no llama-server here")
THERE = "there:135m"
KEY = "sk-llama"
CONTEXT = 512


@pytest.fixture(scope="module")
def llama_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Its base URL."""
    where, port = bundled.find(), free_port(socket.SOCK_STREAM)
    assert where is not None and where.offset == 0 and PROGRAM is not None
    log = tmp_path_factory.mktemp("llama") / "log"
    with log.open("w") as written:
        process = subprocess.Popen(
            [
                PROGRAM, "-m", str(where.path), "--host", "127.0.0.1", "--port", str(port),
                "-c", str(CONTEXT), "-np", "1", "-t", "2", "--api-key", KEY, "--alias", "served",
            ],
            stdout=written, stderr=written,
        )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until(lambda: _is_well(url), "llama-server to load the model")
        yield f"{url}/v1"
    finally:
        process.kill()
        process.wait()


def _is_well(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory, llama_server: str) -> Iterator[UpstreamBox]:
    made = UpstreamBox(tmp_path_factory.mktemp("upstream"))
    made.key_file.write_text(KEY)

    class Server:
        url = llama_server

    server: Any = Server()
    made.use(server, models={THERE: "served"}, key_file=str(made.key_file), health="health")
    yield made
    made.end()


def test_it_counts_a_prompt_as_an_engine_of_the_same_file_does(box: UpstreamBox) -> None:
    assert box.upstreams()[0]["state"] == "ready"
    asked: dict[str, Any] = {"temperature": 0, "max_tokens": 8}
    there, here = (box.chat(model=model, **asked).json() for model in (THERE, HERE))
    assert there["usage"]["prompt_tokens"] == here["usage"]["prompt_tokens"]
    assert there["usage"]["completion_tokens"] == here["usage"]["completion_tokens"] == 8
    assert there["choices"][0]["finish_reason"] == "length"
    (leg,) = box.legs(there["request_id"])
    assert leg["tokens_counted_by"] == "upstream" and leg["upstream_model"] == "served"


def test_its_streams_and_log_probabilities_verify(box: UpstreamBox) -> None:
    done = box.chat(model=THERE, logprobs=True, top_logprobs=3, max_tokens=6, seed=1)
    content = done.json()["choices"][0]["logprobs"]["content"]
    assert len(content) == 6 and all(len(token["top_logprobs"]) == 3 for token in content)
    document = box.receipt(done.json()["request_id"]).content
    checks = verify_receipt(document, transcript=Transcript(answer=done.content))
    assert all(check.ok for check in checks), checks
    body = {"model": THERE, "prompt": "One two three", "stream": True, "max_tokens": 5}
    chunks = events(box.http("POST", "/v1/completions", json=body))
    assert "".join(choice["text"] for chunk in chunks for choice in chunk["choices"])


def test_a_schema_binds_it(box: UpstreamBox) -> None:
    schema = {
        "type": "object", "properties": {"sky": {"enum": ["blue", "red"]}}, "required": ["sky"],
        "additionalProperties": False,
    }  # fmt: skip
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    done = box.chat(model=THERE, response_format=form, max_tokens=40).json()
    assert json.loads(done["choices"][0]["message"]["content"])["sky"] in ("blue", "red")


def test_what_is_too_long_for_it_is_said_as_clients_know_it(box: UpstreamBox) -> None:
    refused = box.chat("word " * (2 * CONTEXT), model=THERE)
    assert refused.status_code == 400
    assert refused.json()["error"]["code"] == "context_length_exceeded"
    assert box.chat(model=THERE, max_tokens=2).status_code == 200


def test_it_stops_when_a_client_leaves(box: UpstreamBox) -> None:
    """It has one place: the next answer begins only once the first has ended."""
    body = {
        "model": THERE, "messages": [{"role": "user", "content": "Count to a million."}],
        "stream": True, "ignore_eos": True, "max_tokens": 400,
    }  # fmt: skip
    headers = {"Authorization": f"Bearer {box.key}"}
    url = f"{box.url}/v1/chat/completions"
    with httpx.stream("POST", url, json=body, headers=headers, timeout=120) as response:
        request_id = response.headers["x-request-id"]
        lines = (line for line in response.iter_lines() if line.startswith("data: {"))
        for _ in range(4):
            next(lines)
    wait_until(lambda: box.receipt(request_id).status_code == 200, "the receipt")
    (leg,) = box.legs(request_id)
    assert leg["finish_reason"] == "cancelled" and leg["completion_tokens"] < 400
    assert box.chat(model=THERE, max_tokens=2).status_code == 200


def test_embeddings_that_it_does_not_make_are_refused(box: UpstreamBox) -> None:
    body = {"model": THERE, "input": "a"}
    assert box.http("POST", "/v1/embeddings", json=body).status_code in (400, 503)
    assert box.chat(model=THERE, max_tokens=2).status_code == 200
