"""Grammars: what is said follows them, and is what would be said anyway where that is allowed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import numpy.typing as npt
import pytest

from pinaivu_box.engine.fake_runner import END, N_VOCAB
from pinaivu_box.engine.messages import Add, Constraint, Tools
from tests.support.engine_harness import EndingRunner, Heard, add, make, run, sampling

SCHEMA = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["cat", "dog"]},
        "age": {"type": "integer", "minimum": 0, "maximum": 20},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 5}, "maxItems": 3},
    },
    "required": ["kind", "age", "tags"],
    "additionalProperties": False,
}


def constrained(name: str, constraint: Constraint | None, **more: Any) -> Add:
    return add(name, f"say {name}", more.pop("max_tokens", 150), constraint=constraint, **more)


def schema(name: str = "r", **more: Any) -> Add:
    return constrained(name, Constraint("json_schema", json.dumps(SCHEMA)), **more)


def said(adds: list[Add], **more: Any) -> Heard:
    return run(make(EndingRunner, context=600, kv_tokens=6000, **more)[0], adds)


@pytest.mark.parametrize("temperature", [0, 0.8, 2.0])
def test_the_output_follows_the_schema(temperature: float) -> None:
    """Of a model that has no idea of it; many at once, and beside free ones."""
    adds = [schema(f"s{n}", sampling=sampling(temperature, seed=n)) for n in range(8)]
    free = [constrained(f"f{n}", None, seed=n) for n in range(3)]
    heard = said([*adds, *free])
    for one in adds:
        assert heard.ends[one.id] == "stop"
        jsonschema.validate(json.loads(heard.text[one.id]), SCHEMA)
    alone = said(free)
    assert all(heard.answer(one.id) == alone.answer(one.id) for one in free)


def test_drafts_change_nothing_and_save_steps() -> None:
    """What the grammar forces is drafted: the same tokens in fewer steps."""
    adds = [schema(f"s{n}", sampling=sampling(1.0, seed=n)) for n in range(5)]
    drafted = said(adds)
    plain = [said([one]) for one in adds]
    for one, alone in zip(adds, plain, strict=True):
        assert drafted.answer(one.id) == alone.answer(one.id)
    longest = max(len(tokens) for tokens in drafted.tokens.values())
    assert drafted.load.steps < longest


@pytest.mark.parametrize(
    ("kind", "text", "wanted"),
    [
        ("regex", "[a-c]{5}-[0-9]{2}", 8),
        ("lark", 'start: "yes" | "no"', None),
        ("gbnf", 'root ::= ("ab" | "cd")+ "!"', None),
    ],
)
def test_grammars_of_other_kinds(kind: Any, text: str, wanted: int | None) -> None:
    heard = said([constrained(f"r{n}", Constraint(kind, text), seed=n) for n in range(6)])
    texts = set(heard.text.values())
    if kind == "lark":
        assert texts <= {"yes", "no"}
    elif kind == "gbnf":
        assert all(set(one[:-1]) <= set("abcd") and one.endswith("!") for one in texts)
    else:
        assert all(len(one) == wanted for one in texts)
    assert set(heard.ends.values()) == {"stop"}


def test_a_draw_that_is_allowed_stands() -> None:
    """A grammar that allows everything changes nothing."""
    anything = Constraint("lark", "start: /(.|\\n)*/")
    adds = [constrained(f"r{n}", None, seed=n, max_tokens=40) for n in range(4)]
    held = [constrained(f"r{n}", anything, seed=n, max_tokens=40) for n in range(4)]
    free, bound = said(adds), said(held)
    assert {one.id: free.answer(one.id) for one in adds} == {
        one.id: bound.answer(one.id) for one in held
    }


def test_penalties_and_biases_hold_inside_a_grammar() -> None:
    """They are applied once, also where a token is drawn again."""
    letters = Constraint("regex", "[ab]{40}")
    kind = sampling(1.0, seed=2, logit_bias={str(ord("a")): -100.0})
    assert said([constrained("r", letters, sampling=kind)]).text["r"] == "b" * 40
    kind = sampling(0, frequency_penalty=2.0)

    class Even(EndingRunner):
        def logits(self, cells: list[int]) -> npt.NDArray[np.float32]:
            logits = np.full(N_VOCAB, 5, np.float32)
            logits[[ord("a"), ord("b")]] = [0.5, 0.0]
            logits[END] = 9
            return logits

    heard = run(make(Even)[0], [constrained("r", letters, sampling=kind)])
    assert heard.text["r"].count("a") == 20


def test_another_leg_goes_on_in_the_middle() -> None:
    whole = said([schema(sampling=sampling(1.0, seed=5))])
    tokens = whole.tokens["r"]
    for cut in (1, len(tokens) // 2, len(tokens) - 1):
        rest = said([schema(sampling=sampling(1.0, seed=5), output=tokens[:cut])])
        assert rest.tokens["r"] == tokens[cut:]


@pytest.mark.parametrize(
    ("constraint", "words"),
    [
        (Constraint("json_schema", '{"not": {"type": "string"}}'), "not"),
        (Constraint("json_schema", '{"$ref": "#/nowhere"}'), "nowhere"),
        (Constraint("json_schema", '{"type": "string", "pattern": "("}'), "JSON schema"),
        (Constraint("gbnf", "root ::= nonsense"), "grammar"),
        (Constraint("lark", "start: ("), "grammar"),
        (Constraint("regex", "(?=a)b"), "grammar"),
    ],
    ids=lambda value: getattr(value, "text", ""),
)
def test_a_constraint_that_no_output_can_follow_is_refused(
    constraint: Constraint, words: str
) -> None:
    heard = said([constrained("r", constraint)])
    assert heard.refused["r"].code == "invalid_body"
    assert words in heard.refused["r"].message


NOT_FOLLOWED: dict[str, Any] = {
    "not": {"type": "string"},
    "if": {},
    "then": {},
    "else": {},
    "uniqueItems": True,
    "contains": {},
    "minContains": 1,
    "maxContains": 1,
    "propertyNames": {"pattern": "a"},
    "dependencies": {"a": ["b"]},
    "dependentRequired": {"a": ["b"]},
    "dependentSchemas": {"a": {}},
    "unevaluatedItems": False,
    "unevaluatedProperties": False,
    "$dynamicRef": "#a",
    "$dynamicAnchor": "a",
    "$recursiveRef": "#",
    "minProperties": 1,
    "maxProperties": 1,
    "format": "colour",
}


@pytest.mark.parametrize("keyword", NOT_FOLLOWED)
def test_each_keyword_that_cannot_be_followed_is_named_and_listed(keyword: str) -> None:
    optional = {"type": "object", "properties": {"a": {}, "b": {}}}
    base = optional if keyword.endswith("Properties") else {}
    text = json.dumps({**base, keyword: NOT_FOLLOWED[keyword]})
    refused = said([constrained("r", Constraint("json_schema", text))]).refused["r"]
    assert re.sub("^(min|max)", "", keyword) in refused.message
    assert f"`{keyword}`" in (Path(__file__).parents[2] / "docs/api.md").read_text()


def test_deeply_nested_schemas_are_refused_or_followed() -> None:
    """Never the end of the engine."""
    deep: dict[str, Any] = {"type": "integer"}
    for _ in range(300):
        deep = {"type": "array", "items": deep, "minItems": 1, "maxItems": 1}
    heard = said([constrained("r", Constraint("json_schema", json.dumps(deep)), max_tokens=50)])
    assert "r" in heard.refused or "r" in heard.ends


# -- tools ---------------------------------------------------------------------------------------

FUNCTIONS: list[dict[str, Any]] = [
    {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 8}},
            "required": ["city"],
        },
    },
    {"name": "now"},
]


@pytest.mark.parametrize("choice", ["required", "weather", "now"])
@pytest.mark.parametrize("parallel", [False, True])
def test_a_call_that_must_be_made_is_valid(choice: str, parallel: bool) -> None:
    tools = Tools(json.dumps(FUNCTIONS), [f["name"] for f in FUNCTIONS], choice, parallel)
    adds = [add(f"r{n}", "x", 120, seed=n, tools=tools) for n in range(6)]
    heard = run(make(EndingRunner, context=900, kv_tokens=9000)[0], adds)
    for one in adds:
        calls = heard.text[one.id].removesuffix("</tool_call>").split("</tool_call>")
        if heard.ends[one.id] == "length":
            calls.pop()  # the last is cut off
        assert parallel or len(calls) == 1
        for text in calls:
            call = json.loads(text.strip().removeprefix("<tool_call>\n"))
            assert call["name"] == (choice if choice != "required" else call["name"])
            wanted = next(f for f in FUNCTIONS if f["name"] == call["name"])
            jsonschema.validate(call["arguments"], wanted.get("parameters", {}))
