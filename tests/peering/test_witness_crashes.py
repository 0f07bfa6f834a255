"""Witnesses and logs in processes of their own, which are killed: nothing is rolled back."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from pinaivu_box.log import checkpoint, note
from tests.support.in_process_command import run_command_json
from tests.support.peer_box import PeerBox, joined_boxes
from tests.support.process_box import wait_until


@pytest.fixture
def member(tmp_path: Path) -> Iterator[Callable[..., PeerBox]]:
    made: list[PeerBox] = []

    def make(name: str, more: str = "", *args: str) -> PeerBox:
        made.append(PeerBox(tmp_path / name, name, more, *args))
        return made[-1]

    yield make
    for box in made:
        box.end()


def cosigned(witness: PeerBox, origin: str) -> int:
    """How many entries of that log a witness has cosigned."""
    name = hashlib.sha256(origin.encode()).hexdigest()
    answer = httpx.get(f"{witness.url}/v1/witness/{name}/checkpoint", timeout=60)
    return int(answer.text.split("\n")[1]) if answer.status_code == 200 else 0


def chat(box: PeerBox) -> str:
    body = {"model": "fake:1", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
    answer: Any = box.http("POST", "/v1/chat/completions", json=body).json()
    return str(answer["request_id"])


def log_of(box: PeerBox) -> Any:
    return box.http("GET", "/v1/log").json()


def test_whoever_is_killed_goes_on_from_what_was_cosigned(
    member: Callable[..., PeerBox],
) -> None:
    anna, ben = joined_boxes(member, "anna", "ben")
    requests = [chat(anna)]
    origin = log_of(anna)["origin"]
    wait_until(lambda: cosigned(ben, origin) == 1, "the first checkpoint is cosigned")
    for killed in (ben, anna):
        requests.append(chat(anna))
        killed.kill()
        killed.start()
        wait_until(lambda: anna.sees("ben") and ben.sees("anna"), "they are connected")
        assert cosigned(ben, origin) >= len(requests) - 1
        wait_until(lambda: cosigned(ben, origin) >= len(requests), "the log is cosigned again")
    assert log_of(anna)["origin"] == origin and log_of(anna)["earlier"] == []
    for request_id in requests:

        def has_witness(request_id: str = request_id) -> bool:
            text = anna.http("GET", f"/v1/log/proof/{request_id}").text.split("\n\n", 1)[1]
            named = checkpoint.witnesses_named(note.read(text))
            return named == [run_command_json("id", home=ben.home)["node_id"]]

        wait_until(has_witness, "the cosignature is stored")
    for box in (anna, ben):
        assert run_command_json("receipts", "evidence", home=box.home) == []
