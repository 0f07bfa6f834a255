"""Reasoning and calls are found in the text of an answer, however it is cut into pieces."""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pinaivu_box.chat_format import LLAMA, MISTRAL, TAGS, Style, style_of
from pinaivu_box.openai import reader as reader_module
from pinaivu_box.openai.reader import Arguments, ParsedCall, Piece, Reader, Reasoning, Text

NAMES = {"f", "g"}
Read = list[tuple[str, ...]]


def read(
    text: str, style: Style | None, cuts: Iterable[int] = (), **more: Any
) -> tuple[Read, bool]:
    """What was found, joined; and whether there was a call.  The end may come with the last text or
    after it."""
    places = [0, *sorted(cut for cut in cuts if cut < len(text)), len(text)]
    parts = [text[start:end] for start, end in pairwise(places)]
    found = _read([*parts, ""], style, **more)
    assert _read(parts, style, **more) == found
    return found


def _read(parts: list[str], style: Style | None, **more: Any) -> tuple[Read, bool]:
    reader = Reader(style, NAMES, **more)
    pieces: list[Piece] = []
    for part in parts[:-1]:
        pieces += reader.take(part)
    pieces += reader.take(parts[-1], "stop")
    found: Read = []
    for piece in pieces:
        match piece:
            case Text(said) | Reasoning(said):
                kind = type(piece).__name__.lower()
                if found and found[-1][0] == kind:
                    said = found.pop()[1] + said
                found.append((kind, said))
            case ParsedCall(index, call_id, name):
                assert call_id.startswith("call_")
                assert index == len([one for one in found if one[0] == "call"])
                found.append(("call", name, ""))
            case Arguments(_, more_text):
                _, name, arguments = found.pop()
                found.append(("call", name, arguments + more_text))
    return found, reader.finish_reason == "tool_calls"


CALL_F = '{"name": "f", "arguments": {"a": "}\\"{[", "b": [1, {"c": 2}]}}'
CALL_G = '{"name": "g", "arguments": {}}'
ARGUMENTS = '{"a": "}\\"{[", "b": [1, {"c": 2}]}'
F, G = ("call", "f", ARGUMENTS), ("call", "g", "{}")


def whole_text(text: str) -> Read:
    return [("text", text)]


CASES: list[tuple[str, Style | None, dict[str, Any], Read]] = [
    (f"<tool_call>\n{CALL_F}\n</tool_call>", TAGS, {}, [F]),
    (
        f"Well. <tool_call>\n{CALL_F}\n</tool_call>\n<tool_call>{CALL_G}</tool_call>\n",
        TAGS,
        {},
        [("text", "Well. "), F, G],
    ),
    (f"\n<tool_call>{CALL_G}</tool_call> done", TAGS, {}, [G, ("text", " done")]),
    (
        '<tool_call>{"arguments": {"x": 1}, "name": "f"}</tool_call>',
        TAGS,
        {},
        [("call", "f", '{"x": 1}')],
    ),
    ("<tool_call> what?", TAGS, {}, [("text", "<tool_call> what?")]),
    ("\n <tool_call>x", TAGS, {}, [("text", "\n <tool_call>x")]),
    (" <tool_call>", TAGS, {}, [("text", " <tool_call>")]),
    ("1 < 2 <tool", TAGS, {}, [("text", "1 < 2 <tool")]),
    (
        '<tool_call>{"name": "f", "arguments": {"x": "cut of',
        TAGS,
        {},
        [("call", "f", '{"x": "cut of')],
    ),
    (f"<tool_call>{CALL_G}\n</tool", TAGS, {}, [G]),
    (
        '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>',
        TAGS,
        {},
        [("text", '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>')],
    ),
    (
        '<tool_call>{"name": "f", "arguments": {"input": "a\\n\\"}"}}</tool_call>',
        TAGS,
        {"custom_tools": ["f"]},
        [("call", "f", 'a\n"}')],
    ),
    (
        f'[TOOL_CALLS][{{"arguments": {{"input": "a"}}, "name": "f"}}, {CALL_G}]',
        MISTRAL,
        {"custom_tools": ["f"]},
        [("call", "f", "a"), G],
    ),
    (
        '<tool_call>{"name": "f", "arguments": {"input": "\\ud83d\\ude00 \\ud83d."}}</tool_call>',
        TAGS,
        {"custom_tools": ["f"]},
        [("call", "f", "\N{GRINNING FACE} .")],
    ),
    (
        '<tool_call>{"name": "f", "arguments": {"input": "cut of\\u00e',
        TAGS,
        {"custom_tools": ["f"]},
        [("call", "f", "cut of")],
    ),
    (f"[TOOL_CALLS][{CALL_F}, {CALL_G}]", MISTRAL, {}, [F, G]),
    (f"Yes.[TOOL_CALLS] [{CALL_G}]", MISTRAL, {}, [("text", "Yes."), G]),
    ('{"name": "f", "parameters": {"x": 1}}', LLAMA, {}, [("call", "f", '{"x": 1}')]),
    (
        '\n {"type": "function", "name": "f", "parameters": {}}',
        LLAMA,
        {},
        [("call", "f", "{}")],
    ),
    ('{"name": "Ada", "age": 36}', LLAMA, {}, [("text", '{"name": "Ada", "age": 36}')]),
    ('{"name": "f", "parameters": "\\ud83d."}', LLAMA, {}, [("call", "f", ".")]),
    ('{"parameters": {"é": "\\ud83d."}, "name": "f"}', LLAMA, {}, [("call", "f", '{"é": "."}')]),
    *(
        (text, LLAMA, dict[str, Any](), whole_text(text))
        for name in ('"\\_"', '"f\n"', '["f"]')
        for text in (f'{{"name": {name}, "parameters": {{}}}}',)
    ),
    ('So: {"name": "f"}', LLAMA, {}, [("text", 'So: {"name": "f"}')]),
    ("<think>\nhm < 3</think>\n\nYes.", None, {"thinks": True}, [
        ("reasoning", "\nhm < 3"), ("text", "Yes.")
    ]),
    (f"hm</think>\n<tool_call>{CALL_G}</tool_call>", TAGS, {"thinks": True, "thinking": True}, [
        ("reasoning", "hm"), G
    ]),
    ("no thoughts", None, {"thinks": True}, [("text", "no thoughts")]),
    ("<thin", None, {"thinks": True}, [("text", "<thin")]),
    ("<think>never ends </thi", None, {"thinks": True}, [("reasoning", "never ends </thi")]),
    (f"{CALL_F} <tool_call> <think>", None, {}, [("text", f"{CALL_F} <tool_call> <think>")]),
    ("", TAGS, {}, []),
]  # fmt: skip


@pytest.mark.parametrize(("text", "style", "more", "found"), CASES, ids=lambda v: str(v)[:40])
@given(cuts=st.lists(st.integers(1, 160), max_size=12))
@settings(max_examples=60)
def test_it_is_found_wherever_the_text_is_cut(
    text: str, style: Style | None, more: dict[str, Any], found: Read, cuts: list[int]
) -> None:
    whole, called = read(text, style, cuts, **more)
    assert whole == found
    assert called == any(one[0] == "call" for one in found)
    assert read(text, style, range(1, len(text)), **more)[0] == found


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=8,
    ),
    st.sampled_from([TAGS, MISTRAL, LLAMA]),
    st.lists(st.integers(1, 200), max_size=10),
)
@settings(max_examples=200)
def test_arguments_come_through_as_they_were_written(
    value: Any, style: Style, cuts: list[int]
) -> None:
    arguments = json.dumps({"value": value}, ensure_ascii=False)
    call = f'{{"name": "f", "{style.arguments_key}": {arguments}}}'
    text = style.opening + style.before + call + style.after + style.closing
    assert read(text, style, cuts)[0] == [("call", "f", arguments)]


@pytest.mark.parametrize(
    "text",
    ['{"a": ["' + "x, " * 3000 + '"]}', "[" + "[1], " * 3000 + "]", '{"name": "' + "x" * 9000],
)
@pytest.mark.parametrize("style", [TAGS, LLAMA])
def test_a_long_object_is_not_decoded_again_at_every_token(
    monkeypatch: pytest.MonkeyPatch, text: str, style: Style
) -> None:
    decoded, matched = [], []
    decode, pattern = reader_module._object, reader_module._HEAD

    class Pattern:
        @staticmethod
        def match(given_text: str) -> Any:
            matched.append(len(given_text))
            return pattern.match(given_text)

    def decode_and_count(text: str) -> Any:
        decoded.append(text)
        return decode(text)

    monkeypatch.setattr(reader_module, "_object", decode_and_count)
    monkeypatch.setattr(reader_module, "_HEAD", Pattern)
    whole = style.trigger + text + " and more" * 200
    parts = [whole[at : at + 3] for at in range(0, len(whole), 3)]
    assert _read(parts, style) == ([("text", whole)], False)
    assert len(decoded) <= 1 and max(matched, default=0) <= 4096


@given(st.text(st.sampled_from('<tool_cal>/[TOLCAS]{} \n"x'), max_size=60), st.data())
@settings(max_examples=300)
def test_no_text_is_lost_that_is_no_call(text: str, data: st.DataObject) -> None:
    style = data.draw(st.sampled_from([TAGS, MISTRAL, LLAMA]))
    cuts = data.draw(st.lists(st.integers(1, 60), max_size=8))
    found, called = read(text, style, cuts)
    assert not called
    assert "".join(one[1] for one in found) == text


@pytest.mark.parametrize(
    ("template", "style"),
    [
        ("{%- if tools %}<tool_call>{{ tool.parameters }}{% endif %}", TAGS),
        ("{% if tools %}[AVAILABLE_TOOLS]{{ tools }}[TOOL_CALLS]{% endif %}", MISTRAL),
        ("{% if tools %}Respond as {'name': x, \"parameters\": y}{% endif %}", LLAMA),
    ],
)
def test_a_family_is_known_by_its_template(template: str, style: Style) -> None:
    assert style_of(template) is style
