"""A box that serves is lost: the client's stream goes on without a seam.  Real boxes, real links;
of the fake model the text is known beforehand."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from pinaivu_box.models import bundled
from pinaivu_box.receipts.verify import Transcript, verify_receipt
from tests.support.box_fleet import STEADY, Fleet, fleet
from tests.support.process_box import wait_until
from tests.support.streamed_chat import StreamedChat
from tests.support.waiting import DEADLINE

MODEL = "fake:2"  # at ben and carl only
DEAR = "fake:3"  # at all three, and anna asks more for it than the others
REAL = "far:1"  # the bundled one under another name, at ben and carl
PLACE = bundled.find()
assert PLACE
SERVERS = tuple(
    word
    for name, path in ((MODEL, "fake:20"), (DEAR, "fake:20"), (REAL, PLACE.path))
    for word in ("--model", f"{name}={path}")
)
SETTINGS = f"""
policy = "cheapest"
{STEADY}[pricing.models]
"{DEAR}" = "1"
[server]
stream_grace_seconds = 300.0  # a stream's header names the box, however slow this machine is
"""
TOKENS = 200  # take 4 s


@pytest.fixture(scope="module")
def boxes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    folder = tmp_path_factory.mktemp("failover")
    asker = ("--model", f"{DEAR}=fake:20")
    with fleet(folder, MODEL, servers=SERVERS, asker=asker, more=SETTINGS) as made:
        yield made


def receipt_of(boxes: Fleet, stream: StreamedChat, text: str | None = None) -> dict[str, Any]:
    """Of a receipt that holds (for that `text`), with its proofs decoded."""
    path = f"/v1/receipts/{stream.request_id}"
    document = boxes.anna.http("GET", path, key=stream.key)
    answer = None if text is None else text.encode()
    checks = verify_receipt(document.content, transcript=Transcript(answer=answer))
    assert all(check.ok for check in checks), checks
    receipt = json.loads(document.json()["signed_receipt"])
    return {**receipt, "proofs": [json.loads(one["signed"]) for one in receipt["proofs"]]}


def proofs_of(boxes: Fleet, stream: StreamedChat) -> list[dict[str, Any]]:
    return list(receipt_of(boxes, stream, stream.text)["proofs"])


def ask(boxes: Fleet, key: str, text: str = "Hello.", model: str = MODEL) -> Any:
    body = {"model": model, "max_tokens": 5, "messages": [{"role": "user", "content": text}]}
    return boxes.anna.http("POST", "/v1/chat/completions", key=key, json=body)


def test_a_request_goes_to_a_box_that_has_the_model(boxes: Fleet) -> None:
    listed = [one.id for one in boxes.anna.client.models.list()]
    assert MODEL in listed
    stream = StreamedChat(boxes.anna, MODEL, 40)
    stream.check_whole(40)
    assert boxes.name_of(stream.route) in ("ben", "carl")
    (proof,) = proofs_of(boxes, stream)
    assert boxes.ids[boxes.name_of(stream.route)] == proof["node_id"]
    assert proof["completion_tokens"] == 40 and proof["witness"] is None
    for name in ("ben", "carl"):
        answer = ask(boxes, boxes.key_for(name))
        assert boxes.name_of(answer.headers["x-pinaivu-route"]) == name


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=lambda how: how.name)
def test_a_box_lost_in_mid_stream_leaves_no_seam(boxes: Fleet, how: signal.Signals) -> None:
    streams = [StreamedChat(boxes.anna, MODEL, TOKENS) for _ in range(3)]
    for stream in streams:
        stream.wait_for_text(20)
    name = boxes.name_of(streams[0].route)
    lost, other = boxes.ids[name], boxes.ids["ben" if name == "carl" else "carl"]
    boxes.lose(name, how)
    late = StreamedChat(
        boxes.anna, MODEL, TOKENS
    )  # of the same conversation: it goes there as well
    for stream in streams:
        stream.check_whole(TOKENS)
        proofs = proofs_of(boxes, stream)
        if boxes.name_of(stream.route) != name:
            assert [one["node_id"] for one in proofs] == [other]
            continue
        first, second = proofs
        assert (first["node_id"], second["node_id"]) == (lost, other)
        assert (first["finish_reason"], second["finish_reason"]) == ("engine_lost", "length")
        # Of the lost box there is what anna saw, and its own signature under that.
        assert first["witness"] == boxes.own and first["mark"]
        assert second["witness"] is None and second["mark"] is None
        assert first["completion_tokens"] >= 20
        assert first["completion_tokens"] + second["completion_tokens"] == TOKENS
        assert first["model_digest"] == second["model_digest"]
        assert first["sampling"] == second["sampling"]
    boxes.anna.command("receipts", "verify", streams[0].request_id)
    late.check_whole(TOKENS)
    assert [one["node_id"] for one in proofs_of(boxes, late)] == [other]
    routing = receipt_of(boxes, late)["routing"]
    tried = [one["node_id"] for one in routing["candidates"] if "tried" in one.get("why_not", "")]
    assert tried == [lost]
    boxes.mend(name)
    assert ask(boxes, boxes.key_for(name)).status_code == 200


def test_a_box_that_is_told_to_stop_finishes_what_it_serves(boxes: Fleet) -> None:
    stream = StreamedChat(boxes.anna, MODEL, TOKENS)
    stream.wait_for_text(20)
    name = boxes.name_of(stream.route)
    boxes.lose(name, signal.SIGTERM)
    stream.check_whole(TOKENS)
    (proof,) = proofs_of(boxes, stream)
    assert proof["node_id"] == boxes.ids[name] and proof["witness"] is None
    assert boxes.servers[name].process.wait(DEADLINE) == 0
    boxes.mend(name)


def told(stream: StreamedChat, choice: int = 0) -> str:
    """What a choice says, and that its log-probabilities are of just that."""
    parts = [one for chunk in stream.chunks for one in chunk["choices"] if one["index"] == choice]
    said = [one["delta"].get("content") or "" for one in parts]
    spelled = [
        bytes(t["bytes"]) for one in parts for t in (one["logprobs"] or {"content": []})["content"]
    ]
    assert b"".join(spelled).decode(errors="replace") == "".join(said)
    return "".join(said)


def test_calls_schemas_and_choices_go_on_as_well(boxes: Fleet) -> None:
    for name in boxes.servers:  # whose digest is learned after that of a fake one
        wait_until(lambda n=name: boxes.offers(n, REAL), "the real model")
    digits = {"type": "integer", "minimum": 0, "maximum": 99}
    numbers = {"type": "array", "items": digits, "minItems": 20, "maxItems": 20}
    schema = {"type": "object", "properties": {"n": numbers}, "required": ["n"],
              "additionalProperties": False}  # fmt: skip
    function = {"type": "function", "function": {"name": "add", "parameters": schema}}
    form = {"type": "json_schema", "json_schema": {"name": "numbers", "schema": schema}}
    more: dict[str, Any] = {"temperature": 1, "seed": 3, "ignore_eos": False}
    for _ in range(5):  # usually they go to the same box, but nothing promises that
        formed = StreamedChat(boxes.anna, REAL, 200, response_format=form, logprobs=True, **more)
        called = StreamedChat(
            boxes.anna, REAL, 200, tools=[function], tool_choice="required", **more
        )
        several = StreamedChat(boxes.anna, REAL, 60, n=2, logprobs=True, seed=3, temperature=1)
        streams = (formed, called, several)
        for stream in streams:
            wait_until(lambda s=stream: len(s.chunks) > 5 or s.error, "a stream has begun")
        if len({boxes.name_of(stream.route) for stream in streams}) == 1:
            break
        for stream in streams:
            stream.join()
    assert not any(s.error for s in streams), [s.error for s in streams]
    lost = boxes.name_of(formed.route)
    boxes.lose(lost, signal.SIGKILL)
    legs = []
    for stream in streams:
        stream.join()
        assert stream.error is None and stream.done
        proofs = receipt_of(boxes, stream)["proofs"]
        assert boxes.name_of(stream.route) == lost
        # One proof is that of the lost box, which had said all before.
        assert len(proofs) > 1 or (boxes.name_of(proofs[0]["node_id"]) == lost
                                   and proofs[0]["witness"] is None)  # fmt: skip
        legs.append(len(proofs))
        assert sum(one["completion_tokens"] for one in proofs) == stream.usage["completion_tokens"]
    assert max(legs) > 1
    assert len(json.loads(told(formed))["n"]) == 20
    deltas = [one["delta"] for chunk in called.chunks for one in chunk["choices"]]
    calls = [one for delta in deltas for one in delta.get("tool_calls") or () if one["index"] == 0]
    arguments = "".join(one["function"].get("arguments") or "" for one in calls)
    assert len(json.loads(arguments)["n"]) == 20
    assert told(several, 0) != told(several, 1)
    assert several.usage["completion_tokens"] == 120
    boxes.mend(lost)


def test_when_all_that_serve_are_lost(boxes: Fleet) -> None:
    """Whoever may goes on at home; who must wait for a box waits, and in the end it is said."""
    for name, model in (("carl", DEAR), ("carl", MODEL), ("ben", MODEL)):  # they are loaded
        assert ask(boxes, boxes.key_for(name), model=model).status_code == 200
    here = StreamedChat(boxes.anna, DEAR, TOKENS, key=boxes.key_for("carl"))
    back = StreamedChat(boxes.anna, MODEL, TOKENS, key=boxes.key_for("ben"))
    nowhere = StreamedChat(boxes.anna, MODEL, TOKENS, key=boxes.key_for("carl"))
    for stream in (here, back, nowhere):
        stream.wait_for_text(20)
    assert [boxes.name_of(one.route) for one in (here, back, nowhere)] == ["carl", "ben", "carl"]
    for name in boxes.servers:
        boxes.lose(name, signal.SIGKILL)
    boxes.mend("ben")
    here.check_whole(TOKENS)
    first, second = proofs_of(boxes, here)
    assert first["witness"] == second["node_id"] == boxes.own
    back.check_whole(TOKENS)
    assert first["completion_tokens"] >= 20
    at_ben = proofs_of(boxes, back)
    assert {one["node_id"] for one in at_ben} == {boxes.ids["ben"]}
    assert at_ben[0]["witness"] == boxes.own and at_ben[-1]["witness"] is None

    nowhere.join()
    assert nowhere.error["code"] == "no_nodes_available" and not nowhere.done
    (only,) = proofs_of(boxes, nowhere)  # what was made is accounted for all the same
    assert only["witness"] == boxes.own and only["completion_tokens"] == len(nowhere.text)
    answer = ask(boxes, boxes.key_for("carl"))
    assert answer.status_code == 503 and int(answer.headers["retry-after"]) >= 1
    assert answer.json()["error"]["code"] == "no_nodes_available"
    boxes.mend("carl")
