"""Boxes on networks of their own: an operator's LAN, a router that masquerades, cables that are
pulled out, packets that get lost."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import pytest

from pinaivu_box.engine.fake_runner import SENTENCE
from tests.support.process_box import wait_until
from tests.support.network_namespaces import Resident, Town

TOKENS = 300
SLOW = "fake:10"  # ms a token


@pytest.fixture(scope="module")
def town() -> Iterator[Town]:
    made = Town()
    try:
        made.build()
    except (OSError, subprocess.CalledProcessError) as error:
        made.end()
        pytest.skip(f"namespaces with a router are not permitted here: {error}")
    yield made
    made.end()


@pytest.fixture(scope="module")
def boxes(town: Town, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Resident]]:
    """anna and ben have one model, carl (at home, behind the router) another."""
    homes: Path = tmp_path_factory.mktemp("town")
    models = {"anna": f"fake:1={SLOW}", "ben": f"fake:1={SLOW}", "carl": "home:1=fake:1"}
    made = {
        name: Resident(town.places[name], homes / name, name, "--model", model)
        for name, model in models.items()
    }
    for box in made.values():
        box.start()
    ticket = made["anna"].command("peers", "invite", "--uses", "2", "--json")
    for name in ("ben", "carl"):
        made[name].command("peers", "join", json.loads(ticket)["ticket"])
    everybody_sees_everybody(made)
    yield made
    for box in made.values():
        box.end()
        assert "Traceback" not in box.errors, box.errors


def everybody_sees_everybody(boxes: dict[str, Resident]) -> None:
    for name, box in boxes.items():
        others = [one for one in boxes if one != name]
        wait_until(lambda box=box, others=others: box.sees(*others), f"{name} to see {others}")


def said(prompt: int, count: int) -> str:
    text = SENTENCE.decode()
    return "".join(text[(prompt - 1 + at) % len(text)] for at in range(count))


def streamed(box: Resident, after: int, then: Callable[[str], None]) -> tuple[str, dict[str, Any]]:
    """The whole text of a streamed answer, and its receipt; `then` is done with the name of the box
    that serves it once so many pieces have come."""
    body = {
        "model": "fake:1", "messages": [{"role": "user", "content": "Hello"}], "stream": True,
        "max_tokens": TOKENS, "stream_options": {"include_usage": True},
    }  # fmt: skip
    names = {one["id"]: name for name, one in box.peers().items()}
    pieces: list[str] = []
    usage: dict[str, Any] = {}

    def listen() -> None:
        with httpx.stream(
            "POST", f"{box.url}/v1/chat/completions", json=body, timeout=60, trust_env=False,
            headers={"Authorization": f"Bearer {box.key}"},
        ) as answer:  # fmt: skip
            assert answer.status_code == 200, answer.read()
            server = names[answer.headers["x-pinaivu-route"].split(";")[0]]
            for line in answer.iter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line.removeprefix("data: "))
                assert "error" not in event, event
                usage.update(event.get("usage") or {}, id=event["request_id"])
                pieces.extend(one["delta"].get("content") or "" for one in event["choices"])
                if len(pieces) == after:
                    Thread(target=then, args=(server,)).start()

    box.place.do(listen)
    assert "".join(pieces) == said(usage["prompt_tokens"], TOKENS)
    found = box.http("GET", f"/v1/receipts/{usage['id']}").json()
    receipt: dict[str, Any] = json.loads(found["signed_receipt"])
    return "".join(pieces), receipt


def test_a_box_behind_a_router_is_a_member_like_any_other(boxes: dict[str, Resident]) -> None:
    """Its links go out; what others want of it comes in over them."""
    for name in ("anna", "ben"):
        link = boxes[name].peers()["carl"]["link"]
        assert link["direct"] and link["address"].startswith("10.77.0.3:"), link
        answer = boxes[name].chat(model="home:1", max_tokens=20).json()
        text = answer["choices"][0]["message"]["content"]
        assert text == said(answer["usage"]["prompt_tokens"], 20)
    _, receipt = streamed(boxes["carl"], TOKENS, lambda _: None)
    assert receipt["node_id"] != receipt["coordinator_id"]


def test_packets_get_lost(town: Town, boxes: dict[str, Resident]) -> None:
    town.lose(0.05)
    _, receipt = streamed(boxes["carl"], TOKENS, lambda _: None)
    town.lose(0)
    assert len(receipt["proofs"]) == 1


def test_the_cable_of_the_serving_box_is_pulled_out(town: Town, boxes: dict[str, Resident]) -> None:
    pulled: list[str] = []

    def pull(name: str) -> None:
        pulled.append(name)
        town.cut(name)

    _, receipt = streamed(boxes["carl"], 20, pull)
    assert len(receipt["proofs"]) == 2
    (name,) = pulled
    wait_until(lambda: not boxes["carl"].sees(name), "it is missed")
    town.cut(name, "up")
    everybody_sees_everybody(boxes)


def test_the_serving_box_is_killed(boxes: dict[str, Resident]) -> None:
    killed: list[str] = []

    def kill(name: str) -> None:
        killed.append(name)
        boxes[name].kill()

    _, receipt = streamed(boxes["carl"], 20, kill)
    assert len(receipt["proofs"]) == 2
    boxes[killed[0]].start()
    everybody_sees_everybody(boxes)
