"""No history ends a chat: what a template would refuse is given to it in another form."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pinaivu_box.errors import BadRequest
from tests.support.engine_harness import Template

TURNS = (
    "{% if messages[0].role == 'system' %}<{{ messages[0].content }}>"
    "{% set messages = messages[1:] %}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0)"
    " or m.role == 'system' or not m.content %}"
    "{{ raise_exception('user and assistant take turns') }}{% endif %}"
    "{{ m.role[0] }}:{{ m.content }}|{% endfor %}"
)
ROLES = {"s": "system", "u": "user", "a": "assistant"}


def said(line: str) -> list[dict[str, Any]]:
    """ "uHi aHo": a user's "Hi", an assistant's "Ho"."""
    return [{"role": ROLES[one[0]], "content": one[1:]} for one in line.split()]


@pytest.mark.parametrize(
    ("line", "prompt"),
    [
        ("sS uA aB uC", "<S>u:A|a:B|u:C|"),
        ("uA uB", "u:A\n\nB|"),
        ("uA uB uC aD uE", "u:A\n\nB\n\nC|a:D|u:E|"),
        ("sS sT uA uB", "<S\n\nT>u:A\n\nB|"),
        ("uA sS", "u:A\n\nS|"),
        ("sS uA aB sT uC", "<S>u:A|a:B|u:T\n\nC|"),
        ("aA uB", "u:...|a:A|u:B|"),
        ("sS aA uB", "<S>u:...|a:A|u:B|"),
        ("uA aB aC uD", "u:A|a:B\n\nC|u:D|"),
        ("uA a uB", "u:A\n\nB|"),
        ("aA", "u:...|a:A|"),
        ("a", "u:...|"),
    ],
)
def test_a_template_that_insists_on_turns_gets_them(line: str, prompt: str) -> None:
    assert Template(TURNS).render(said(line)) == prompt


def test_a_template_that_takes_messages_as_they_are_gets_them_so() -> None:
    source = "{% for m in messages %}{{ m.role[0] }}{{ m.content }} {% endfor %}"
    assert Template(source).render(said("aA sS uB uC a aD")) == "aA sS uB uC a aD "


# -- arguments of calls ----------------------------------------------------------------------------


def calling(*arguments: str) -> list[dict[str, Any]]:
    calls = [
        {"id": f"call0000{n}", "type": "function", "function": {"name": "f", "arguments": one}}
        for n, one in enumerate(arguments)
    ]
    results = [{"role": "tool", "tool_call_id": one["id"], "content": "Done."} for one in calls]
    return [*said("uDo"), {"role": "assistant", "content": "", "tool_calls": calls}, *results]


def writing(how: str) -> Template:
    """A template that knows tools and writes arguments so."""
    source = (
        "{% if tools %}{% endif %}{% for m in messages %}{{ m.content if m.role == 'user' }}"
        "{% for c in m.tool_calls or [] %}{% set a = c.function.arguments %}|"
    )
    return Template(f"{source}{how}{{% endfor %}}{{% endfor %}}")


ITEMS = "{% for k, v in a | items %}{{ k ~ '=' ~ v }};{% endfor %}"
METHOD = "{% for k, v in a.items() %}{{ k ~ '=' ~ v }};{% endfor %}"
TEXT = "{{ '' + a + '' }}"
PRINTED = "{{ a }}"
STRIPPED = "{{ a.strip() }}"
JSON = "{{ a | tojson }}"
EITHER = "{{ a if a is string else a | tojson }}"
CUT = '{"x": "Ro'
DEEP = "[" * 100_000
ARGUMENTS: dict[str, tuple[str, str, str, str]] = {  # in items, in text, in JSON, in either
    '{"x": "é"}': ("x=é;", '{"x": "é"}', '{"x": "é"}', '{"x": "é"}'),
    "{}": ("", "{}", "{}", "{}"),
    "": ("", "{}", "{}", "{}"),
    " null\n": ("", "{}", "{}", "{}"),
    '"{\\"x\\": 1}"': ("x=1;", '{"x": 1}', '{"x": 1}', '{"x": 1}'),
    "[1, 2]": ("arguments=[1, 2];", "[1, 2]", '"[1, 2]"', "[1, 2]"),
    "7": ("arguments=7;", "7", '"7"', "7"),
    "at noon": ("arguments=at noon;", "at noon", '"at noon"', "at noon"),
    CUT: (f"arguments={CUT};", CUT, json.dumps(CUT), CUT),
    DEEP: (f"arguments={DEEP};", DEEP, json.dumps(DEEP), DEEP),
}


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=lambda one: repr(one)[:20])
def test_arguments_that_are_no_object_are_what_the_template_takes(arguments: str) -> None:
    items, text, as_json, either = ARGUMENTS[arguments]
    history = calling(arguments)
    for how, written in (
        (ITEMS, items), (METHOD, items), (TEXT, text), (PRINTED, text), (STRIPPED, text),
        (JSON, as_json), (EITHER, either),
    ):  # fmt: skip
        assert writing(how).render(history) == f"Do|{written}"


def test_one_call_that_was_cut_changes_no_other() -> None:
    first = '{"x": 1}'
    assert writing(ITEMS).render(calling(first, CUT, "")) == f"Do|x=1;|arguments={CUT};|"
    assert writing(EITHER).render(calling(first, CUT, "")) == f"Do|{first}|{CUT}|{{}}"
    in_words = Template().render(calling(first, ""))
    assert f'"arguments": {first}}}' in in_words and '"arguments": {}}' in in_words


def test_arguments_nested_as_deeply_as_json_can_be_read_are_no_error() -> None:
    for levels in range(100, 3000, 100):
        text = '{"a":' * levels + "1" + "}" * levels
        for how in (ITEMS, TEXT, JSON):
            assert writing(how).render(calling(text)).startswith("Do")


# -- calls and results -----------------------------------------------------------------------------

SHOWN = (
    "{% for m in messages %}{% if m.role == 'tool' %}={{ m.content }}{% else %}"
    "{{ m.role[0] }}:{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name }}"
    "{% endfor %}{% endif %}|{% endfor %}{% if tools %}{% endif %}"
)


def refusing(condition: str, before: str = "") -> Template:
    refusal = f"{{% if {condition} %}}{{{{ raise_exception('no') }}}}{{% endif %}}"
    return Template(f"{before}{{% for m in messages %}}{refusal}{{% endfor %}}{SHOWN}")


def test_calls_of_one_message_are_made_one_by_one() -> None:
    single = refusing("m.tool_calls and m.tool_calls | length > 1")
    history = calling("", "", "")
    del history[3]  # a result that never came
    history[2:] = reversed(history[2:])
    history[1]["content"] = "Now."
    after = [*history, *said("uB")]
    assert single.render(after) == "u:Do|a:Now.f|=Done.|a:f|a:f|=Done.|u:B|"


def test_ids_have_the_length_that_a_template_wants() -> None:
    source = (
        "{% if tools %}{% endif %}{% for m in messages %}{% for c in m.tool_calls or [] %}"
        "{% if c.id | length != 9 %}{{ raise_exception('nine') }}{% endif %}{{ c.id }} {% endfor %}"
        "{{ m.tool_call_id }}{{ ' ' if m.tool_call_id }}{{ m.content if m.role == 'user' }}"
        "{% endfor %}"
    )
    history = calling("", "")
    assert Template(source).render(history) == "Docall00000 call00001 call00000 call00001 "
    history[1]["tool_calls"][0]["id"] = history[2]["tool_call_id"] = "call_" + "0" * 24
    first, second, *results = Template(source).render(history).removeprefix("Do").split()
    assert results == [first, second] and second == "call00001"
    assert len(first) == 9 and first.isalnum()


def test_results_of_no_call_are_a_user_s_words() -> None:
    """As gpt-oss, which raises where no call came before."""
    template = refusing(
        "m.role == 'tool' and not ns.called",
        "{% set ns = namespace(called=false) %}{% for m in messages if m.tool_calls %}"
        "{% set ns.called = true %}{% endfor %}",
    )
    words = "<tool_response>\nDone.\n</tool_response>"
    assert template.render(calling()[:1] + calling("")[2:]) == f"u:Do|u:{words}|"
    assert template.render(calling("")[2:]) == f"u:{words}|"


def test_turns_are_counted_without_calls_and_results() -> None:
    """As Mistral's templates do, so that a user may not speak right after a result."""
    template = Template(
        "{% set ns = namespace(n=0) %}{% for m in messages %}"
        "{% if m.role in ('user', 'assistant') and not m.tool_calls %}"
        "{% if (m.role == 'user') != (ns.n % 2 == 0) %}{{ raise_exception('turns') }}{% endif %}"
        "{% if not m.content %}{{ raise_exception('says nothing') }}{% endif %}"
        "{% set ns.n = ns.n + 1 %}{% endif %}{% endfor %}" + SHOWN
    )
    asked = calling("")
    assert template.render([*asked, *said("uB")]) == "u:Do|a:f|=Done.|a:...|u:B|"
    assert template.render([*asked, *said("aA a uB")]) == "u:Do|a:f|=Done.|a:A|u:B|"
    apart = [asked[0], *said("aA"), *asked[1:], *said("aB")]
    assert template.render(apart) == "u:Do|a:Af|=Done.|a:B|"


def test_a_template_that_wants_a_user_gets_one() -> None:
    template = refusing("not messages | selectattr('role', 'equalto', 'user') | list")
    assert template.render(said("sS")) == "u:S|"
    assert template.render(said("sS aA")) == "s:S|u:...|a:A|"


def test_a_message_that_a_template_omits_is_given_in_another_form() -> None:
    """As Mistral's, which write a system message with a user's only."""
    source = (
        "{% for m in messages %}{% if m.role == 'user' %}[{{ m.content }}]{% endif %}{% endfor %}"
    )
    assert Template(source).render(said("sS")) == "[S]"
    assert Template(source).render(said("sS uA")) == "[A]"
    assert Template("{{ messages | length }}").render(said("sS uA")) == "2"


def test_calls_that_no_form_makes_readable_are_given_in_words() -> None:
    template = refusing("m.role not in ('user', 'assistant') or m.tool_calls")
    prompt = template.render([*said("sS"), *calling('{"x": 1}'), *said("uB")])
    call = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
    result = "<tool_response>\nDone.\n</tool_response>"
    assert prompt == f"u:S\n\nDo|a:{call}|u:{result}\nB|"


# -- what cannot be rendered -----------------------------------------------------------------------


def test_a_refusal_says_what_the_template_said_first() -> None:
    template = refusing("m.content == 'forbidden'")
    with pytest.raises(BadRequest, match="refuses these messages: no") as caught:
        template.render([{"role": "user", "content": "forbidden"}])
    assert caught.value.status == 400
    assert template.render(said("uA")) == "u:A|"


def test_a_template_that_raises_on_all_is_blamed_by_the_model_s_name() -> None:
    template = Template("{{ messages[0].content.nothing.at.all }}", model="m:latest")
    with pytest.raises(BadRequest) as caught:
        template.render(said("uA"))
    said_so = "chat template of model 'm:latest' fails on every chat"
    assert said_so in caught.value.message and "use completions" in caught.value.message
