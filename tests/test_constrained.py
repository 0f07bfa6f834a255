"""Outputs under a grammar come to an end, however much the model would like to go on."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.box import MODEL, Box


def liking(box: Box, text: str) -> dict[str, int]:
    """A bias with which the model writes the characters of `text` wherever it may."""
    bias = {}
    for character in text:
        done = box.http("POST", "/v1/tokenize", json={"model": MODEL, "text": character})
        (token,) = done.json()["tokens"]
        bias[str(token)] = 50
    return bias


def answer(box: Box, **options: Any) -> Any:
    done = box.client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "How many?"}], max_tokens=120, **options
    )
    return done.choices[0]


@pytest.mark.parametrize(
    "number",
    [
        {"type": "integer"},
        {"type": ["integer", "null"]},
        {"type": "integer", "minimum": 0},
        {"type": "integer", "exclusiveMaximum": 5},
        {"type": "number", "minimum": 0, "maximum": 10},
    ],
)
def test_a_number_ends(box: Box, number: dict[str, Any]) -> None:
    schema = {"type": "object", "properties": {"n": number}, "required": ["n"]}
    form = {"type": "json_schema", "json_schema": {"name": "count", "schema": schema}}
    choice = answer(box, response_format=form, logit_bias=liking(box, "0123456789.-"), seed=1)
    assert choice.finish_reason == "stop", choice.message.content
    assert abs(json.loads(choice.message.content)["n"]) < 2**53


def test_a_number_of_a_call_ends_and_a_named_function_is_called_once(box: Box) -> None:
    parameters = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    tool = {"type": "function", "function": {"name": "count", "parameters": parameters}}
    named = {"type": "function", "function": {"name": "count"}}
    options = {"tools": [tool], "logit_bias": liking(box, "0123456789-\n"), "seed": 1}
    choice = answer(box, tool_choice=named, **options)
    (call,) = choice.message.tool_calls
    assert choice.finish_reason == "tool_calls"
    assert abs(json.loads(call.function.arguments)["n"]) < 2**53
    # With the same likings, whoever may call as often as it likes does.
    assert len(answer(box, tool_choice="required", **options).message.tool_calls) > 1
