"""What `/v1/responses` stores: what a conversation needs, so much of each key, for so long."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from pinaivu_box import config
from tests.support.process_box import Box, StartBox
from tests.support.stored_responses import client_with_new_key, stored_rows

MOST, MB = 6, 0.06
LIMITS = f"[retention]\nresponses_per_key = {MOST}\nresponses_mb_per_key = {MB}\n"
JUNK = "x" * 2_000_000


@pytest.fixture(scope="module")
def here(module_box: StartBox) -> Box:
    return module_box("--model", "fake:1=fake:0", config=LIMITS)


@pytest.fixture
def client(here: Box) -> Any:
    """Of a key that has stored nothing."""
    return client_with_new_key(here)


def respond(client: Any, given: Any = "hi", **more: Any) -> Any:
    return client.responses.create(model="fake:1", input=given, max_output_tokens=4, **more)


def send(here: Box, client: Any, given: Any, **more: Any) -> dict[str, Any]:
    """As `respond`, of what the SDK would take long to look at."""
    body = {"model": "fake:1", "input": given, "max_output_tokens": 4, **more}
    made = here.http("POST", "/v1/responses", key=client.api_key, json=body)
    assert made.status_code == 200, made.text[:500]
    return dict(made.json())


def there(client: Any, made: list[Any]) -> list[bool]:
    found = []
    for one in made:
        try:
            found.append(client.responses.retrieve(one.id).id == one.id)
        except openai.NotFoundError:
            found.append(False)
    return found


ITEMS: dict[str, list[dict[str, Any]]] = {
    "in an item": [{"role": "user", "content": "hi", "more": JUNK}],
    "in a part": [{"role": "user", "content": [{"type": "input_text", "text": "hi", "z": JUNK}]}],
    "thoughts": [
        {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": JUNK,
         "content": [{"type": "reasoning_text", "text": JUNK}]},
        {"role": "user", "content": "hi"},
    ],
    "beside a text": [
        {"role": "user", "content": [{"type": "input_text", "text": "hi", "refusal": JUNK}]}
    ],
    "as empty parts": [
        {"role": "user", "content": [{"type": "input_text", "text": "hi"},
                                     *[{"type": "input_text", "text": ""}] * 5_000]}
    ],
    "as an id": [{"id": JUNK, "status": JUNK, "role": "user", "content": "hi"}],
    "beside a call": [
        {"role": "user", "content": "hi"},
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}", "note": JUNK},
        {"type": "function_call_output", "call_id": "c", "output": "1", "note": JUNK},
    ],
}  # fmt: skip


@pytest.mark.parametrize("items", ITEMS.values(), ids=ITEMS)
def test_ignored_parts_of_items_are_not_stored(
    here: Box, client: Any, items: list[dict[str, Any]]
) -> None:
    made = send(here, client, items)
    assert made["usage"]["input_tokens"] < 300
    assert stored_rows(here)[made["id"]]["bytes"] < 2500
    listed = [one.to_dict() for one in client.responses.input_items.list(made["id"]).data][::-1]
    kinds = [one.get("type", "message") for one in items]
    assert [one["type"] for one in listed] == kinds
    assert JUNK not in str(listed)
    texts = [one["content"][0]["text"] for one in listed if one["type"] == "message"]
    assert texts == ["hi"]
    if "function_call" in kinds:
        assert (listed[1]["call_id"], listed[1]["arguments"]) == ("c", "{}")
        assert (listed[2]["call_id"], listed[2]["output"]) == ("c", "1")
    if kinds[0] == "reasoning":
        assert listed[0]["id"] == "rs_1"
    # And the conversation goes on from what is kept.
    more = respond(client, "more", previous_response_id=made["id"])
    assert more.usage.input_tokens > made["usage"]["input_tokens"]


def test_tools_schemas_and_reasoning_that_no_model_has_read_are_not_stored(
    here: Box, client: Any
) -> None:
    """Tools that may not be called, what a schema tells to nobody, and thoughts without number."""
    tool = {"type": "function", "name": "f", "parameters": {}, "description": JUNK[:500_000]}
    schema = {
        "type": "object",
        "properties": {},
        "additionalProperties": False,
        "title": JUNK[:100_000],
    }
    form = {"format": {"type": "json_schema", "name": "f", "schema": schema}}
    thoughts = [{"type": "reasoning", "id": "r" * 64, "summary": []}] * 16_000
    said = {"role": "user", "content": "hi"}
    made = send(here, client, [*thoughts, said], tools=[tool], tool_choice="none", text=form)
    assert made["tools"][0]["name"] == "f" and made["usage"]["input_tokens"] < 200
    assert stored_rows(here)[made["id"]]["bytes"] < 130_000
    kept = client.responses.retrieve(made["id"])
    assert kept.tools == [] and kept.text.format.name == "f"
    many = here.http("POST", "/v1/responses", json={"model": "fake:1", "input": [said] * 16_385})
    assert many.status_code == 422
    larger: dict[str, Any] = {"model": "fake:1", "input": "hi", "tool_choice": "none"}
    larger["tools"] = [{**tool, "description": JUNK}]
    assert here.http("POST", "/v1/responses", json=larger).json()["error"]["param"] == "tools"


@pytest.mark.parametrize(
    "given",
    [
        {"user": JUNK},
        {"reasoning": {"effort": None, "summary": JUNK}},
        {"metadata": {"a": JUNK}},
        {"metadata": {JUNK: "a"}},
        {"input": [{"type": "function_call_output", "call_id": JUNK, "output": "1"}]},
    ],
    ids=["user", "summary", "value", "name", "call_id"],
)
def test_a_field_that_is_too_long_is_refused_briefly(here: Box, given: dict[str, Any]) -> None:
    body = {"model": "fake:1", "input": "hi", "max_output_tokens": 4, **given}
    refused = here.http("POST", "/v1/responses", json=body)
    assert refused.status_code == 422 and len(refused.text) < 1000


def test_names_of_ignored_fields_are_shortened(here: Box) -> None:
    body = {"model": "fake:1", "input": "hi", "max_output_tokens": 4, "y" * 100_000: 1}
    made = here.http("POST", "/v1/responses", json=body).json()
    assert made["ignored_parameters"] == ["y" * 100]
    assert stored_rows(here)[made["id"]]["bytes"] < 2500


def test_the_oldest_of_a_key_go_and_no_other_s(here: Box, client: Any) -> None:
    other = client_with_new_key(here)
    kept = [respond(other) for _ in range(2)]
    made = [respond(client) for _ in range(MOST + 3)]
    assert there(client, made) == [False] * 3 + [True] * MOST
    assert there(client, kept) == [True] * 2
    assert made[0].id not in stored_rows(here)


def test_a_key_has_so_many_bytes(here: Box, client: Any) -> None:
    large = {f"n{n}": "v" * 512 for n in range(16)}
    made = [respond(client, metadata=large) for _ in range(2)]
    small = [respond(client) for _ in range(2)]
    assert there(client, made + small) == [True] * 4
    tool = {"type": "function", "name": "f", "parameters": {}, "description": "d" * 58_000}
    huge = respond(client, tools=[tool], tool_choice="none")
    # As many of the oldest as it takes, and the new one is there even if it is alone.
    assert there(client, [*made, *small, huge])[-1]
    found = stored_rows(here)
    mine = [one for one in found.values() if one["stored_by"] == found[huge.id]["stored_by"]]
    assert sum(one["bytes"] for one in mine) <= MB * 1e6 or [one["id"] for one in mine] == [huge.id]
    assert there(client, made) == [False, False]


def test_a_conversation_that_lost_its_beginning_is_not_gone_on_with(here: Box, client: Any) -> None:
    first = respond(client, "My name is Ada.")
    second = respond(client, "And then?", previous_response_id=first.id)
    third = respond(client, "And now?", previous_response_id=second.id)
    whole = third.usage.input_tokens
    for _ in range(MOST - 2):
        respond(client)
    assert there(client, [first, second, third]) == [False, True, True]
    with pytest.raises(openai.NotFoundError, match="not stored from its beginning") as caught:
        respond(client, "And now?", previous_response_id=third.id)
    assert first.id in str(caught.value)
    (item,) = client.responses.input_items.list(third.id).data
    assert item.content[0].text == "And now?"
    # What somebody deletes is wanted gone: then it begins after that.
    made = [respond(client, "One.")]
    for text in ("Two.", "Three."):
        made.append(respond(client, text, previous_response_id=made[-1].id))
    client.responses.delete(made[0].id)
    shorter = respond(client, "Three.", previous_response_id=made[1].id)
    assert 0 < shorter.usage.input_tokens < made[2].usage.input_tokens < whole + 100


def test_a_long_conversation_is_stored_once(here: Box, client: Any) -> None:
    """Not again with each of its responses."""
    previous, sizes = None, []
    for _ in range(MOST):
        more: dict[str, Any] = {} if previous is None else {"previous_response_id": previous}
        made = respond(client, "x" * 300, instructions="y" * 100, **more)
        previous = made.id
        sizes.append(stored_rows(here)[made.id]["bytes"])
    assert max(sizes) - min(sizes[1:]) < 20


def test_they_are_kept_30_days_unless_set() -> None:
    found = config.load(None, environ={}).retention
    assert (found.responses, found.responses_per_key) == ("30d", 10_000)
