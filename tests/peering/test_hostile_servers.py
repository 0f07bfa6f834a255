"""A member that serves others' requests and lies.

The client gets a right answer from somebody else, or one plain error, and nothing false is signed,
counted or logged.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from pinaivu_box.legs import runner
from pinaivu_box.legs import wire as leg_wire
from pinaivu_box.transport.link import Stream
from tests.support.fake_model import FAKE, fake_text
from tests.support.fake_peer import Violation
from tests.support.three_boxes import ThreeBoxes, checked, right
from tests.support.violations import VIOLATIONS, ends
from tests.support.waiting import wait_until

pytestmark = pytest.mark.anyio


@pytest.fixture
async def world(three: ThreeBoxes, caplog: pytest.LogCaptureFixture) -> AsyncIterator[ThreeBoxes]:
    async with three.lied_to(caplog):
        yield three


async def test_an_honest_box_serves_without_a_dispute(world: ThreeBoxes) -> None:
    """So that the lies below fail for their own reasons."""
    liar = world.lie(Violation())
    answer = (await world.anna.chat()).json()
    receipt = await checked(world, answer)
    assert receipt["node_id"] == world.carl.identity.node_id
    await wait_until(lambda: len(liar.heard) == 1)
    assert isinstance(liar.heard[0], leg_wire.Accepted)
    assert len(await world.entries()) == 1
    assert "0.0 disputes" in await world.why()


@pytest.mark.parametrize("name", VIOLATIONS)
async def test_a_violation_is_found_and_another_box_serves(world: ThreeBoxes, name: str) -> None:
    lie, sentence = VIOLATIONS[name]
    liar, before = world.lie(lie), len(await world.entries())
    # A text of its own each time: warm caches decide nothing here.
    answer = await world.anna.chat(name, user=name)
    assert answer.status_code == 200, answer.text
    told = answer.json()
    assert liar.asked == 1
    prompt = told["usage"]["prompt_tokens"]
    assert told["choices"][0]["message"]["content"] == fake_text(prompt, 20)
    assert told["choices"][0]["finish_reason"] == "length"
    receipt = await checked(world, told)
    assert receipt["node_id"] == world.ben.node_id
    assert len(await world.entries()) == before  # it is owed nothing
    why = await world.why()
    assert sentence in why and why.isprintable(), why
    assert not any(isinstance(one, leg_wire.Accepted) for one in liar.heard)


REFUSALS = [
    leg_wire.LegRefused("invalid_api_key", "Your key is no good."),
    leg_wire.LegRefused("budget_exceeded", "Pay first.", other=True, retry_after=2**31 - 1),
    leg_wire.LegRefused("invalid_body", "No.\r\n\x1b[31m", param="messages\n.0"),
    leg_wire.LegRefused("context_length_exceeded", "n_prompt_tokens"),
    leg_wire.LegRefused("because", "\N{RIGHT-TO-LEFT OVERRIDE}" * 4000),
]


@pytest.mark.parametrize("refused", REFUSALS, ids=lambda one: one.code)
async def test_a_request_that_one_box_refuses_is_served_by_another(
    world: ThreeBoxes, refused: leg_wire.LegRefused
) -> None:
    async def refuse(peer: str, stream: Stream) -> None:
        await leg_wire.receive(stream, leg_wire.to_serving)
        await leg_wire.send(stream, refused)
        await stream.finish()

    world.carl.handler = refuse
    answer = await world.anna.chat(refused.code)
    assert answer.status_code == 200, answer.text
    world.anna.forget()
    alone = await world.key("carl")
    answer = await world.anna.chat(refused.code, secret=alone)
    error = answer.json()["error"]
    assert answer.status_code in (400, 422, 503), error
    assert error["message"].isprintable() and int(answer.headers.get("retry-after", 1)) <= 60


async def test_an_old_proof_is_no_new_one(world: ThreeBoxes) -> None:
    """Nor in another's mouth, nor in the ledger."""
    liar = world.lie(Violation())
    liar.identity = world.carl.identity
    kept: list[leg_wire.LegProof] = []

    def keep(proof: leg_wire.LegProof) -> leg_wire.LegProof:
        kept.append(proof)
        return proof

    world.lie(Violation(proved=keep))
    assert (await world.anna.chat("the first")).status_code == 200
    before = await world.entries()
    world.lie(Violation(proved=lambda _: kept[0]))
    await right(world, await world.anna.chat("the second"))
    assert "another request_id" in await world.why()
    assert [tuple(one) for one in await world.entries()] == [tuple(one) for one in before]


@pytest.mark.parametrize("name", ["a mark of nothing", "tokens that were not made", "no word"])
async def test_one_plain_error_if_there_is_nobody_else(
    world: ThreeBoxes, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Before the first token as an answer, after it in the stream."""
    monkeypatch.setattr(runner, "_PATIENCE_SECONDS", 0.1)
    if name in VIOLATIONS:
        world.lie(VIOLATIONS[name][0])
    else:
        world.carl.handler = ends
    alone = await world.key("carl")
    answer = await world.anna.chat(name, secret=alone)
    error = answer.json()["error"]
    assert answer.status_code == 503 and error["code"] == "no_nodes_available"
    assert error["message"].isprintable(), error
    world.anna.forget()
    answer = await world.anna.chat(name, secret=alone, stream=True)
    assert answer.text.count('"error"') == 1


async def test_without_end_there_is_an_end(
    world: ThreeBoxes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an answer that nobody has limited."""
    monkeypatch.setattr(leg_wire, "MAX_TOKENS", 100)
    world.lie(Violation(count=101))
    answer = await world.anna.chat("endless", max_tokens=None, stop=["."])
    assert answer.status_code == 200
    assert "more tokens than requested" in await world.why()


FUNCTION = {"name": "f", "parameters": {"type": "object"}}
APIS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"tools": [{"type": "function", "function": FUNCTION}]},
    "/v1/responses": {"tools": [{"type": "function", **FUNCTION}], "store": False},
    "/v1/messages": {"tools": [{"name": "f", "input_schema": {"type": "object"}}]},
}
# A call as a model wrote it -> its arguments as text, and as an object; None if it is no call.
WRITTEN: dict[str, tuple[str, Any] | None] = {
    '{"name": "f", "parameters": {"a": "\\ud83d.", "é": "\\ud83d\\ude00"}}': (
        '{"a": "\\ud83d.", "é": "\\ud83d\\ude00"}', {"a": ".", "é": "\N{GRINNING FACE}"},
    ),
    '{"parameters": {"a": "\\ud83d."}, "name": "f"}': ('{"a": "."}', {"a": "."}),
    '{"name": "f", "parameters": "\\ud83d."}': (".", {}),
    '{"name": "f", "parameters": [1]}': ("[1]", {}),
    '{"name": "\\_", "parameters": {}}': None,
    '{"name": "f\n", "parameters": {}}': None,
}  # fmt: skip


@pytest.mark.parametrize("path", APIS)
@pytest.mark.parametrize("wrote", WRITTEN)
async def test_a_call_that_no_grammar_held(world: ThreeBoxes, path: str, wrote: str) -> None:
    """Whatever the model wrote, there is an answer, and one in JSON that all can read."""
    data = list(wrote.encode())
    world.lie(
        Violation(
            began=lambda one: replace(one, tool_style="llama"), count=len(data),
            tokens=lambda _: data, text=lambda _: wrote, reason="stop",
        )
    )  # fmt: skip
    given = "input" if path == "/v1/responses" else "messages"
    most = "max_output_tokens" if path == "/v1/responses" else "max_tokens"
    user = [{"role": "user", "content": "Call it."}]
    body = {"model": FAKE, given: user, most: 200, **APIS[path]}
    secret = await world.key("carl")
    answer = await world.anna.http("POST", path, json=body, secret=secret)
    assert answer.status_code == 200, answer.text
    answer.text.encode()
    made = msgspec.json.decode(answer.content)
    if path == "/v1/chat/completions":
        (choice,) = made["choices"]
        message = choice["message"]
        (found,) = message.get("tool_calls") or [{"text": message["content"]}]
        found = found.get("function", found)
    else:
        (found,) = made["output"] if "output" in made else made["content"]
        (found,) = found.get("content") or [found]
    wanted = WRITTEN[wrote]
    if wanted is None:
        assert found["text"] == wrote
    else:
        assert found.get("arguments", wanted[0]) == wanted[0]
        assert found.get("input", wanted[1]) == wanted[1]
    streamed = await world.anna.http("POST", path, json={**body, "stream": True}, secret=secret)
    assert '"error":{' not in streamed.text
    assert any(end in streamed.text for end in ("[DONE]", "response.completed", "message_stop"))
