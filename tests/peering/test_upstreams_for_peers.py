"""A box that lets its peers use its upstream: real boxes in processes, and a server as vLLM's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from pinaivu_box.receipts.commitment import prompt_text
from pinaivu_box.receipts.verify import Transcript, verify_receipt
from tests.support.peer_box import PeerBox, joined_boxes
from tests.support.process_box import wait_until
from tests.support.vllm_server import MODEL, Exchange, VllmServer, answer, vllm_server

UPSTREAM = """
[pricing]
per_1k_tokens = "1"
[[upstream]]
name = "cluster"
url = "{url}"
for_peers = {allowed}
health_seconds = 0.2
"""


@pytest.fixture(scope="module")
def server() -> Iterator[VllmServer]:
    with vllm_server() as vllm:
        yield vllm


@pytest.fixture(scope="module")
def boxes(tmp_path_factory: pytest.TempPathFactory, server: VllmServer) -> Iterator[list[PeerBox]]:
    """The first has the upstream, and lets the second use it."""
    folder = tmp_path_factory.mktemp("boxes")
    made: list[PeerBox] = []

    def member(name: str) -> PeerBox:
        more = UPSTREAM.format(url=server.url, allowed="true") if name == "owner" else ""
        made.append(PeerBox(folder / name, name, more))
        return made[-1]

    try:
        both = joined_boxes(member, "owner", "asker")
        wait_until(lambda: MODEL in models(both[1]), "the peer to offer the upstream's model")
        yield both
    finally:
        for box in made:
            box.stop()


@pytest.fixture(autouse=True)
def usual_answer(server: VllmServer) -> None:
    server.script = answer()


def models(box: PeerBox) -> list[str]:
    return [model["id"] for model in box.http("GET", "/v1/models").json()["data"]]


def ask(box: PeerBox, **more: Any) -> Any:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Why?"}], **more}
    return box.http("POST", "/v1/chat/completions", json=body)


def receipt(box: PeerBox, request_id: str) -> bytes:
    shown: bytes = box.http("GET", f"/v1/receipts/{request_id}").content
    return shown


def signed_in(shown: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    """What was signed of the request, and of its first leg."""
    signed = json.loads(json.loads(shown)["signed_receipt"])
    return signed, json.loads(signed["proofs"][0]["signed"])


def ledger(box: PeerBox) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = box.http("GET", "/v1/admin/ledger").json()["data"]
    return found


def test_a_peer_answers_from_its_upstream_and_is_owed_for_it(
    boxes: list[PeerBox], server: VllmServer
) -> None:
    owner, asker = boxes
    response = ask(asker, temperature=0.25, seed=5)
    assert response.status_code == 200, response.text
    body = response.json()
    assert body["choices"][0]["message"]["content"] == "The sky is blue."
    assert body["usage"]["prompt_tokens"] == 12 and body["usage"]["completion_tokens"] == 6
    assert server.last.body["temperature"] == 0.25

    shown = receipt(asker, body["request_id"])
    asked = prompt_text([{"role": "user", "content": "Why?"}], [])
    transcript = Transcript(prompts=[asked], answer=b"The sky is blue.")
    checks = verify_receipt(shown, transcript=transcript)
    assert all(check.ok for check in checks), checks
    signed, leg = signed_in(shown)
    assert signed["v"] == leg["v"] == 3
    assert leg["kind"] == "upstream, not executed by a box"
    assert leg["upstream"] == "cluster" and leg["upstream_model"] == MODEL
    assert leg["node_id"] == signed["node_id"] != signed["coordinator_id"]
    assert leg["sampling"]["temperature"] == 0.25
    assert any("nobody proves what ran there" in check.meaning for check in checks)

    # Both books have the same debt: 18 tokens at 1 credit for 1,000.
    wait_until(lambda: ledger(owner) and ledger(asker), "both ledgers to have the leg")
    (theirs,), (ours,) = ledger(owner), ledger(asker)
    assert theirs["served"] == ours["received"] != "0"


def test_a_stream_comes_as_the_upstream_makes_it(boxes: list[PeerBox]) -> None:
    response = ask(boxes[1], stream=True)
    chunks = [json.loads(line[6:]) for line in response.text.splitlines() if line[:7] == "data: {"]
    said = [c["choices"][0]["delta"].get("content") or "" for c in chunks if c["choices"]]
    assert "".join(said) == "The sky is blue." and len([text for text in said if text]) > 1


def test_two_choices_are_two_legs_and_one_prompt(boxes: list[PeerBox]) -> None:
    body = ask(boxes[1], n=2).json()
    assert len(body["choices"]) == 2
    assert body["usage"]["prompt_tokens"] == 12 and body["usage"]["completion_tokens"] == 12
    assert all(check.ok for check in verify_receipt(receipt(boxes[1], body["request_id"])))


def test_thoughts_that_are_not_shown_are_not_billed(
    boxes: list[PeerBox], server: VllmServer
) -> None:
    """The asker can check the text alone, so no more is owed than it can have."""

    def hides(exchange: Exchange) -> None:
        exchange.chunk(content="Yes.")
        exchange.chunk("stop", content="")
        exchange.usage(12, 5000)
        exchange.done()

    server.script = hides
    body = ask(boxes[1]).json()
    assert body["choices"][0]["message"]["content"] == "Yes."
    assert body["usage"]["completion_tokens"] == 2 * 2 + 64
    _, leg = signed_in(receipt(boxes[1], body["request_id"]))
    assert leg["tokens_counted_by"] == "estimate"


def test_an_upstream_that_fails_in_the_middle_ends_the_request(
    boxes: list[PeerBox], server: VllmServer
) -> None:
    def cuts(exchange: Exchange) -> None:
        exchange.chunk(content="The sky")
        exchange.cut()

    server.script = cuts
    response = ask(boxes[1], stream=True)
    assert "The sky" in response.text and '"error"' in response.text
    server.script = answer()
    wait_until(lambda: ask(boxes[1]).status_code == 200, "the upstream to be asked again")


def test_a_key_that_stays_here_never_goes_there(boxes: list[PeerBox], server: VllmServer) -> None:
    _, asker = boxes
    policy = {"scopes": ["inference", "local-only"]}
    made = asker.http("POST", "/v1/admin/keys", json={"account": "owner", "policy": policy})
    before = len(server.requests)
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Why?"}]}
    response = asker.http("POST", "/v1/chat/completions", key=made.json()["key"], json=body)
    assert response.status_code in (404, 503) and len(server.requests) == before


def test_without_permission_no_peer_hears_of_it(boxes: list[PeerBox], server: VllmServer) -> None:
    owner, asker = boxes
    config = owner.home / "config.toml"
    allowed = config.read_text()
    config.write_text(allowed.replace("for_peers = true", "for_peers = false"))
    try:
        assert owner.http("POST", "/v1/admin/reload").status_code == 200
        wait_until(lambda: MODEL not in models(asker), "the offer to be withdrawn")
        before = len(server.requests)
        assert ask(asker).status_code in (404, 503)
        assert len(server.requests) == before
        assert ask(owner).status_code == 200  # its own keys may use it
    finally:
        config.write_text(allowed)
        assert owner.http("POST", "/v1/admin/reload").status_code == 200
