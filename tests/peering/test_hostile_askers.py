"""A member that asks for what no honest box asks for: it is refused, owes what it got, and nobody
else is served worse for it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest

from pinaivu_box.errors import LinkLost
from pinaivu_box.legs import wire as leg_wire
from pinaivu_box.transport import wire
from tests.support.fake_coordinator import accept, ask, entry, heard, opened, served, sign
from tests.support.three_boxes import ThreeBoxes

pytestmark = pytest.mark.anyio
NAN = float("nan")


@pytest.fixture
async def world(three: ThreeBoxes, caplog: pytest.LogCaptureFixture) -> AsyncIterator[ThreeBoxes]:
    async with three.asked_much(caplog):
        yield three


async def test_a_peer_that_pays_is_served(world: ThreeBoxes) -> None:
    asked = ask(world)
    stream, proved = await served(world, asked)
    await accept(stream, sign(world, proved))
    found = await entry(world, asked)
    assert found is not None and found["acceptance"] == sign(world, proved)


# -- what cannot be asked ------------------------------------------------------------------------


def functions(text: str, choice: str = "required") -> dict[str, Any]:
    return {"tools": {"functions": text, "names": ["f"], "choice": choice, "parallel": True}}


def schema(kind: str, text: str) -> dict[str, Any]:
    return {"constraint": {"kind": kind, "text": text}}


def drawn(**changes: Any) -> dict[str, Any]:
    usual = {"temperature": 0.8, "top_p": 0.95, "top_k": 40, "min_p": 0.05, "seed": 7}
    return {"settled": {**usual, **changes}}


def says(*messages: Any) -> dict[str, Any]:
    return {"messages": list(messages)}


# Fields of the task that are changed on the wire.
TASKS: dict[str, dict[str, Any]] = {
    "no role": says({}),
    "no content": says({"role": "user"}),
    "a call without a function": says({"role": "assistant", "content": "", "tool_calls": [{}]}),
    "a call that is a number": says({"role": "assistant", "content": "", "tool_calls": 5}),
    "bytes for a text": says({"role": "user", "content": b"\xff\xfe"}),
    "deep messages": says({"role": "user", "content": msgspec.Raw(b"\x91" * 50_000 + b"\x90")}),
    "deep variables": {"template": {"x": msgspec.Raw(b"\x81\xa1a" * 50_000 + b"\xc0")}},
    "tokens outside the vocabulary": {"read": [2**31 - 1]},
    "a prompt of them": {"prompt": [257]},
    "no tokens": {"read": []},
    "no prompt": {"prompt": []},
    "negative tokens": {"read": [-1]},
    "a text of them": {"inputs": [[2**31 - 1]]},
    "no texts": {"inputs": []},
    "an empty text": {"inputs": [[]]},
    "a text of nothing": {"inputs": [""]},
    "vectors without end": {"inputs": ["a"], "dimensions": 2**31 - 1},
    "functions that are no JSON": functions("{"),
    "functions that are no list": functions("5"),
    "functions without names": functions("[{}]"),
    "functions that are numbers": functions("[1]"),
    "functions nested too deeply": functions("[" * 100_000),
    "functions without end": functions('[{"name": "f"}]' + " " * 600_000),
    "names without end": {"tools": {"functions": "[]", "names": ["f"] * 2000, "choice": "auto"}},
    "a schema that is no JSON": schema("json_schema", "{"),
    "a schema without end": schema("json_schema", '{"type": "string"}' + " " * 300_000),
    "a grammar larger than is taken": schema("gbnf", 'root ::= "a"' + " " * 100_000),
    "a stop string without end": {"stop": ["x" * 2000]},
    "a schema nested too deeply": schema("json_schema", '{"items":' * 50_000),
    "a broken expression": schema("regex", "((((("),
    "a grammar without end": schema("gbnf", "root ::= root"),
    "a kind that is none": schema("poem", "x"),
    "too large a seed": {"seed": 2**63},
    "a temperature that is no number": {"asked": {"temperature": NAN}},
    "an earlier leg's that is none": drawn(temperature=NAN),
    "an earlier leg's other seed": drawn(seed=8),
    "an earlier leg's penalty": drawn(repeat_penalty=1e-300),
    "an earlier leg's typical-p": drawn(typical_p=-1.0),
    "a bias beyond the vocabulary": {"logit_bias": {"999999999": 1.0}},
    "a bias of no token": {"logit_bias": {"x": 1.0}},
    "more than a proof can say": {"max_tokens": 2**53},
    "less than nothing": {"max_tokens": -1},
    "a leg of many": {"leg": 65},
    "a negative choice": {"choice": -1},
    "an id that is none": {"request_id": "req_'; DROP TABLE keys"},
    "another's id": {"request_id": "x" * 5000},
    "an id with a line break": {"request_id": f"req_{'0' * 26}\n"},
    "an id in capitals": {"request_id": f"REQ_{'0' * 26}"},
    "an id in other digits": {"request_id": "req_" + "\u0660" * 26},
    "a nonce with a line break": {"nonce": "0" * 64 + "\n"},
    "a nonce in capitals": {"nonce": "AB" * 32},
    "a bias of a token in other digits": {"logit_bias": {"\uff15": 1.0}},
    "a bias of a token and a line break": {"logit_bias": {"5\n": 1.0}},
    "a bias of a token in another spelling": {"logit_bias": {"05": 1.0}},
    "a short nonce": {"nonce": "00"},
    "no model": {"model": ""},
    "a model that is not there": {"model": "fake:2"},
    "a path for a model": {"model": "../../etc/passwd"},
    "an empty stop string": {"stop": [""]},
    "too many stop strings": {"stop": ["a"] * 65},
    "a prompt larger than the context": says({"role": "user", "content": "x" * 9000}),
    "fields that nobody knows, and no model": {"local_only": True, "hops": -1, "model": "no:1"},
}
# Fields of the Ask beside it.
ASKS: dict[str, dict[str, Any]] = {
    "another file": {"digest": "00" * 32},
    "half a digest": {"digest": "00"},
    "a digest with a line break": {"digest": "00" * 32 + "\n"},
    "a price with a line break": {"prices": ["1000\n"] * 3},
    "a price in other digits": {"prices": ["\u0661\u0660\u0660\u0660"] * 3},
    "lower prices": {"prices": ["0", "0", "0"]},
    "prices that are none": {"prices": ["x", "-1", "NaN"]},
    "prices beyond all": {"prices": ["1e999999"] * 3},
    "another currency": {"currency": "gold"},
    "made of tokens that are none": {"made": [257] * 3},
    "made of half a million": {"made": [2**31] * 5},
    "a tag that is none": {"type": "give"},
    "nothing to do": {"type": "stop"},
    "a proof to accept": {"type": "accepted", "signature": "00" * 64},
}


@pytest.mark.parametrize("name", [*TASKS, *ASKS])
async def test_a_task_that_cannot_be_served_is_refused(world: ThreeBoxes, name: str) -> None:
    asked = msgspec.to_builtins(ask(world))
    asked |= ASKS.get(name, {})
    asked["task"] |= TASKS.get(name, {})
    stream = await opened(world)
    await stream.send(b"\0" + msgspec.msgpack.encode(asked))
    try:
        found = await heard(stream)
    except LinkLost as lost:  # what no box says ends the link, with a reason
        assert lost.code == 400 and lost.reason, lost
    else:
        assert isinstance(found[-1], leg_wire.LegRefused), found
        assert "log says why" not in found[-1].message
        assert not any(isinstance(one, leg_wire.Outputs) for one in found)
        await stream.finish()
    assert await entry(world, ask(world)) is None


@pytest.mark.parametrize("most", [0, 2**53 - 1])
async def test_limits_that_are_no_use(world: ThreeBoxes, most: int) -> None:
    asked = ask(world, max_tokens=most)
    stream, proved = await served(world, asked)
    await accept(stream, sign(world, proved))
    assert await entry(world, asked)


async def test_more_earlier_tokens_than_the_context_has_end_the_leg(world: ThreeBoxes) -> None:
    """More than the context has."""
    asked = msgspec.structs.replace(ask(world, max_tokens=None), made=[65] * 100_000)
    stream = await opened(world)
    await leg_wire.send(stream, asked)
    found = await heard(stream)
    assert isinstance(found[-1], leg_wire.Outputs) and not found[-1].outputs[-1].tokens
    stream.abandon()


# -- large messages ------------------------------------------------------------------------------


def raw_list(count: int) -> msgspec.Raw:
    """So many zeros."""
    return msgspec.Raw(b"\xdd" + count.to_bytes(4, "big") + b"\x00" * count)


LARGE = {
    "two long lists of tokens": {name: raw_list(2**21) for name in ("read", "prompt")},
    "many names": {"template": {f"{n:06}": True for n in range(200_000)}},
    "many messages": {"messages": [{"role": "user", "content": ""}] * 150_000},
    "many texts": {"inputs": [""] * 400_000},
}


@pytest.mark.parametrize("task", LARGE.values(), ids=LARGE.keys())
async def test_a_large_message_is_not_decoded_before_it_was_looked_at(
    world: ThreeBoxes, task: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of it is decoded in this process, so nobody waits for that."""
    sizes: list[int] = []
    decode = wire.decode

    def decoded(frame: bytes, decoder: Any) -> Any:
        sizes.append(len(frame))
        return decode(frame, decoder)

    monkeypatch.setattr(leg_wire, "decode", decoded)
    stream = await opened(world)
    await leg_wire.send(stream, ask(world, **task))
    with pytest.raises(LinkLost):
        await heard(stream)
    assert max(sizes, default=0) < 256 * 1024
