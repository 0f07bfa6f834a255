"""A network in which one box has the code of an earlier commit: what
`tests/before/run_two_versions` tries at length, in short.  That commit knew no witnesses, no proofs
of version 4, and a database of version 5."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.old_code import checkout, is_there
from tests.support.peer_box import MakePeerBox, PeerBox
from tests.support.process_box import wait_until
from tests.support.streamed_chat import StreamedChat

OLD = "6b2bf8e818"
pytestmark = pytest.mark.skipif(not is_there(OLD), reason="this clone does not have that commit")


@pytest.fixture(scope="module")
def code() -> Iterator[Path]:
    with checkout(OLD) as found:
        yield found


def served_by(asks: PeerBox, serves: PeerBox) -> str:
    """An answer of a model that only the other box has; returns its request id."""
    model = f"{serves.name}:1"
    wait_until(lambda: model in asks.http("GET", "/v1/models").text, f"{model} is offered")
    stream = StreamedChat(asks, model, 20)
    stream.check_whole(20)
    receipt = asks.http("GET", f"/v1/receipts/{stream.request_id}").json()
    assert receipt["node_id"] == serves.admin("GET").json()["own"]["id"]
    asks.command("receipts", "verify", stream.request_id)
    return stream.request_id


def accepted(box: PeerBox, peer: PeerBox) -> list[str]:
    """The request ids of legs between the two, as the box has them in its ledger."""
    entries: list[dict[str, Any]] = box.command_json("ledger", "show", peer.name)
    return sorted(one["request_id"] for one in entries if one["accepted"])


@pytest.mark.parametrize("old", ["anna", "ben"])
def test_two_versions_form_a_network_and_serve_each_other(
    member: MakePeerBox, code: Path, old: str
) -> None:
    """The old one invites, or is invited; both ask and serve, and one is removed.  Each is operated
    with the commands of its own version."""
    anna, ben = (member(name, "", "--model", f"{name}:1=fake:0") for name in ("anna", "ben"))
    (anna if old == "anna" else ben).prefix = ("env", "-C", str(code))
    anna.start()
    ben.start()
    ben.peers("join", anna.invite("--name", "ben"))
    wait_until(lambda: anna.sees("ben") and ben.sees("anna"), "both are connected")
    ids = sorted((served_by(anna, ben), served_by(ben, anna)))
    for box, peer in ((anna, ben), (ben, anna)):
        wait_until(lambda b=box, p=peer: accepted(b, p) == ids, "both legs are in its ledger")
    anna.peers("rm", "ben", "--reason", "sold")
    wait_until(lambda: anna.sees("ben", "revoked") and ben.alone(), "it is cut off")
