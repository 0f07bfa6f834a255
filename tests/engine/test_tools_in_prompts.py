"""Tools in prompts: as the model's template has them, or in words where it knows none."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from pinaivu_box import chat_format
from pinaivu_box.engine.messages import Constraint, Refused, Tools
from pinaivu_box.engine.request_preparer import PreparedRequest, RequestPreparer
from pinaivu_box.engine.sequence import Sequence
from tests.support.engine_harness import StrictRunner, Template, add, in_this_process, load

FUNCTION = {"name": "f", "description": "It does.", "parameters": {"type": "object"}}
CALL = {
    "id": "call_1",
    "type": "function",
    "function": {"name": "f", "arguments": '{"x": "é"}'},
}
HISTORY: list[dict[str, Any]] = [
    {"role": "user", "content": "Do it."},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "call_1", "content": "Done."},
]
OBJECTS = (
    "{{ tools | tojson }}{% for m in messages %}[{{ m.role }}]{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.arguments.x }}{% endfor %}{% endfor %}"
)
STRINGS = (
    "{% for t in tools %}{{ t.function.name }}{% endfor %}"
    "{% for m in messages %}{% for c in m.tool_calls or [] %}"
    "{{ 'called with ' + c.function.arguments }}{% endfor %}{% endfor %}"
)


def test_a_template_that_knows_tools_gets_them() -> None:
    text = Template(OBJECTS).render(HISTORY, [FUNCTION])
    told, _, rest = text.partition("[user]")
    assert json.loads(told) == [{"type": "function", "function": FUNCTION}]
    assert rest == "Do it.[assistant]é[tool]Done."
    assert Template(STRINGS).render(HISTORY, [FUNCTION]) == 'fcalled with {"x": "é"}'


def test_a_template_that_knows_none_is_told_in_words() -> None:
    text = Template().render([{"role": "system", "content": "Be kind."}, *HISTORY], [FUNCTION])
    assert text.count("<|im_start|>system") == 1
    assert "Be kind." in text and json.dumps(FUNCTION) in text
    assert '<tool_call>\n{"name": "f", "arguments": {"x": "é"}}\n</tool_call>' in text
    assert "<|im_start|>user\n<tool_response>\nDone.\n</tool_response>" in text
    assert "tool_call>" not in Template().render(HISTORY[:1])


STRICT = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('alternate') }}{% endif %}[{{ m.role }}]{{ m.content }}{% endfor %}"
)


def test_a_template_without_a_system_role_has_its_words_before_the_user_s() -> None:
    system = {"role": "system", "content": "Be kind."}
    assert Template(STRICT).render([system, HISTORY[0]]) == "[user]Be kind.\n\nDo it."
    assert json.dumps(FUNCTION) in Template(STRICT).render([HISTORY[0]], [FUNCTION])
    assert Template(STRICT).render([system]) == "[user]Be kind."


def test_results_and_what_is_said_after_them_are_one_turn() -> None:
    """Of a template that knows no tools, and may insist on turns."""
    after = {"role": "user", "content": "And now?"}
    text = Template(STRICT).render([*HISTORY, HISTORY[2], after])
    result = "<tool_response>\nDone.\n</tool_response>"
    assert text.endswith(f"[user]{result}\n{result}\nAnd now?")


def test_variables_reach_the_template() -> None:
    source = "{% if enable_thinking %}<think>{% else %}</think>{% endif %}"
    assert Template(source).thinks and not Template("{{ messages }}").thinks
    assert Template(source).render([], None, {"enable_thinking": True}) == "<think>"
    assert Template(source).render([], None, {"enable_thinking": False}) == "</think>"


class Known(StrictRunner):
    """A runner whose file has a template, infill tokens, and one control token, 255."""

    TEMPLATE: str | None = None
    INFILL: tuple[int, int, int] | None = None

    def __init__(self) -> None:
        super().__init__(load(context=4000))
        self.facts = dataclasses.replace(
            self.facts, chat_template=self.TEMPLATE, infill=self.INFILL
        )

    def tokenize(self, text: str, limit: int | None = None, *, special: bool = False) -> list[int]:
        found: list[int] = []
        for number, part in enumerate(text.split("[TOOL_CALLS]")):
            found += ([255] if number else []) + list(part.encode())
        return found

    def piece(self, token: int) -> bytes:
        return b"" if token == 255 else super().piece(token)


def prepare(runner: StrictRunner, **more: Any) -> PreparedRequest | Refused:
    arrival = RequestPreparer(runner, in_this_process(), load(drafting=False)).prepare(add(**more))
    if isinstance(arrival, PreparedRequest) and arrival.compile is not None:
        return arrival.compile() or arrival
    return arrival


def test_a_mark_that_is_a_control_token_is_one_in_grammar_and_text() -> None:
    class Mistral(Known):
        TEMPLATE = "{{ tools }}[AVAILABLE_TOOLS][TOOL_CALLS]{{ messages }}"

    runner = Mistral()
    tools = Tools('[{"name": "f"}]', ["f"], "required", False)
    arrival = prepare(runner, tools=tools)
    assert isinstance(arrival, PreparedRequest) and isinstance(arrival.sequence, Sequence)
    grammar = arrival.sequence.grammar
    assert grammar is not None
    said: list[int] = []
    for token in [255, *b'[{"name": "f", "arguments": {}}]']:
        assert grammar.allows(token), bytes(said)
        grammar.take(token)
        said.append(token)
    assert grammar.done and not grammar.broken
    text = "".join(arrival.detokenizer.push(token) for token in said)
    assert text == '[TOOL_CALLS][{"name": "f", "arguments": {}}]'


def test_a_tool_that_is_told_and_not_allowed_is_not_called() -> None:
    class Tagged(Known):
        TEMPLATE = "{{ tools }}<tool_call>{{ messages }}"

    for style, names in (("auto", ["g"]), ("required", ["g"]), ("auto", [])):
        tools = Tools('[{"name": "f"}, {"name": "g"}]', names, style, False)
        arrival = prepare(Tagged(), tools=tools)
        assert isinstance(arrival, PreparedRequest) and isinstance(arrival.sequence, Sequence)
        grammar = arrival.sequence.grammar
        if not names:
            assert grammar is None
            continue
        for token in b'<tool_call>\n{"name": "':
            assert grammar is not None and grammar.allows(token)
            grammar.take(token)
        assert grammar is not None and grammar.allows(ord("g")) and not grammar.allows(ord("f"))


CALL_TEXT = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'


@pytest.mark.parametrize(
    ("asked", "wanted"),
    [
        ({"constraint": Constraint("json_schema", '{"const": 7}')}, "7"),
        ({"constraint": Constraint("regex", "7+")}, "7"),
        ({"constraint": Constraint("lark", 'start: "7"')}, "7"),
        ({"constraint": Constraint("gbnf", 'root ::= "7"')}, "7"),
        ({"tools": Tools('[{"name": "f"}]', ["f"], "required", False)}, CALL_TEXT),
        ({"tools": Tools('[{"name": "f"}]', ["f"], "f", True)}, CALL_TEXT),
    ],
    ids=["schema", "regex", "lark", "gbnf", "required", "named"],
)
def test_after_thoughts_an_answer_keeps_to_what_it_must_be(asked: Any, wanted: str) -> None:
    class Thinker(Known):
        TEMPLATE = "{{ tools }}{{ messages }}</think><tool_call>{{ '<think>' }}"

    arrival = prepare(Thinker(), **asked)
    assert isinstance(arrival, PreparedRequest) and arrival.prompt.thinking
    assert isinstance(arrival.sequence, Sequence)
    grammar = arrival.sequence.grammar
    assert grammar is not None
    for token in b"well, 8?</think>\n\n":
        assert grammar.allows(token)
        grammar.take(token)
    for token in wanted.encode():
        assert not grammar.allows(ord("8")) and grammar.allows(token)
        grammar.take(token)
    assert not grammar.broken


def test_infill_is_prefix_suffix_middle() -> None:
    class Coder(Known):
        INFILL = (252, 253, 254)

    arrival = prepare(Coder(), prompt="def ", suffix="pass")
    assert isinstance(arrival, PreparedRequest)
    assert arrival.prompt.tokens == [252, *b"def ", 253, *b"pass", 254]
    refused = prepare(Known(), prompt="def ", suffix="pass")
    assert isinstance(refused, Refused) and refused.param == "suffix"


def test_styles_are_told_apart() -> None:
    assert Template(OBJECTS.replace("x", "parameters")).style is chat_format.TAGS
    assert Template(OBJECTS + "{{ '\"parameters\"' }}").style is chat_format.LLAMA
    assert Template("{{ messages }}[TOOL_CALLS]").style is chat_format.TAGS  # it has no tools
