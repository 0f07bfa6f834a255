"""Boxes on networks of their own: an operator's LAN, a router that masquerades, cables that are
pulled out, packets that get lost."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.fake_model import fake_text
from tests.support.network_namespaces import SLOW, TOKENS, NamespaceBox, NatNetwork, streamed
from tests.support.process_box import wait_until


@pytest.fixture(scope="module")
def town() -> Iterator[NatNetwork]:
    made = NatNetwork()
    try:
        made.build()
    except (OSError, subprocess.CalledProcessError) as error:
        made.end()
        pytest.skip(f"namespaces with a router are not permitted here: {error}")
    yield made
    made.end()


@pytest.fixture(scope="module")
def boxes(
    town: NatNetwork, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, NamespaceBox]]:
    """anna and ben have one model, carl (at home, behind the router) another."""
    homes: Path = tmp_path_factory.mktemp("town")
    models = {"anna": f"fake:1={SLOW}", "ben": f"fake:1={SLOW}", "carl": "home:1=fake:1"}
    made = {
        name: NamespaceBox(town.places[name], homes / name, name, "--model", model)
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


def everybody_sees_everybody(boxes: dict[str, NamespaceBox]) -> None:
    for name, box in boxes.items():
        others = [one for one in boxes if one != name]
        wait_until(lambda box=box, others=others: box.sees(*others), f"{name} to see {others}")


def test_a_box_behind_a_router_is_a_member_like_any_other(boxes: dict[str, NamespaceBox]) -> None:
    """Its links go out; what others want of it comes in over them."""
    for name in ("anna", "ben"):
        link = boxes[name].peers()["carl"]["link"]
        assert link["direct"] and link["address"].startswith("10.77.0.3:"), link
        answer = boxes[name].chat(model="home:1", max_tokens=20).json()
        text = answer["choices"][0]["message"]["content"]
        assert text == fake_text(answer["usage"]["prompt_tokens"], 20)
    _, receipt = streamed(boxes["carl"], TOKENS, lambda _: None)
    assert receipt["node_id"] != receipt["coordinator_id"]


def test_packets_get_lost(town: NatNetwork, boxes: dict[str, NamespaceBox]) -> None:
    town.lose(0.05)
    _, receipt = streamed(boxes["carl"], TOKENS, lambda _: None)
    town.lose(0)
    assert len(receipt["proofs"]) == 1


def test_the_cable_of_the_serving_box_is_pulled_out(
    town: NatNetwork, boxes: dict[str, NamespaceBox]
) -> None:
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


def test_the_serving_box_is_killed(boxes: dict[str, NamespaceBox]) -> None:
    killed: list[str] = []

    def kill(name: str) -> None:
        killed.append(name)
        boxes[name].kill()

    _, receipt = streamed(boxes["carl"], 20, kill)
    assert len(receipt["proofs"]) == 2
    boxes[killed[0]].start()
    everybody_sees_everybody(boxes)
