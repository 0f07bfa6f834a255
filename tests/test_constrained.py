"""Outputs under a grammar come to an end, however much the model would like to go on; and what no
grammar can be made of in time is refused, while others are served."""

from __future__ import annotations

import json
import threading
from typing import Any

import pytest

from tests.support.grammars import chain
from tests.support.in_process_command import run_command_json
from tests.support.process_box import MODEL, Box, wait_until


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
    # Without other properties, of which the digits that it likes could be the names.
    schema: dict[str, Any] = {"type": "object", "properties": {"n": number}, "required": ["n"]}
    schema |= {"additionalProperties": False}
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


# -- what grammars cost ----------------------------------------------------------------------------


class RepeatedStream:
    """A stream of another account's key, read in a thread: `chunks` counts what has come."""

    def __init__(self, box: Box, key: str) -> None:
        self.chunks = 0
        self._end = threading.Event()
        self._client = box.client_with(key)
        self._thread = threading.Thread(target=self._read)
        self._thread.start()
        wait_until(lambda: self.chunks > 2, "its beginning")

    def _read(self) -> None:
        messages: Any = [{"role": "user", "content": "Tell me a long story."}]
        while not self._end.is_set():
            with self._client.chat.completions.create(
                model=MODEL,
                messages=messages,
                max_tokens=1000,
                stream=True,
                extra_body={"ignore_eos": True},
            ) as stream:
                for _ in stream:
                    self.chunks += 1
                    if self._end.is_set():
                        return

    def end(self) -> None:
        self._end.set()
        self._thread.join()


def other_key(box: Box) -> str:
    return str(run_command_json("keys", "create", home=box.home)["key"])


def test_a_grammar_that_takes_too_long_is_refused_while_others_stream(box: Box) -> None:
    key = other_key(box)
    stream = RepeatedStream(box, key)
    try:
        before, answers = stream.chunks, []

        def structured() -> None:
            schema = {"enum": ["yes", "no"]}
            form = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}
            body = {"model": MODEL, "messages": [{"role": "user", "content": "?"}], "seed": 1,
                    "max_tokens": 20, "response_format": form}  # fmt: skip
            answers.append(box.http("POST", "/v1/chat/completions", json=body, key=key))

        other = threading.Thread(target=structured)
        other.start()
        # Each is another text, so that none is refused for what is known of it.
        refused = [box.chat(grammar=chain(2400 - n), max_tokens=5) for n in range(2)]
        assert answers, "another's structured output waited for them"
        other.join()
        assert stream.chunks > before
    finally:
        stream.end()
    assert answers[0].status_code == 200
    content = answers[0].json()["choices"][0]["message"]["content"]
    assert json.loads(content) in ("yes", "no")
    for one in refused:
        assert one.status_code == 422 and one.json()["error"]["param"] == "grammar"
        assert "takes more than 2 s of CPU time to compile" in one.json()["error"]["message"]


@pytest.mark.parametrize(
    ("field", "value", "most"),
    [
        ("grammar", 'root ::= "' + "x" * 70_000 + '"', 65_536),
        (
            "response_format",
            {
                "type": "json_schema",
                "json_schema": {"name": "s", "schema": {"enum": ["x" * 300_000]}},
            },
            262_144,
        ),
        (
            "tools",
            [{"type": "function", "function": {"name": "f", "description": "x" * 600_000}}],
            524_288,
        ),
        ("stop", ["x" * 2000], 1024),
    ],
    ids=["grammar", "schema", "tools", "stop"],
)
def test_a_field_that_is_too_large_is_refused_with_its_limit(
    box: Box, field: str, value: Any, most: int
) -> None:
    done = box.chat(**{field: value})
    assert done.status_code == 422
    assert done.json()["error"]["param"].startswith(field)
    assert str(most) in done.json()["error"]["message"]
