"""Texts that the operator names: recognised in what templates make of them, whole or not at all."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from pinaivu_box.engine import named_prefixes
from pinaivu_box.engine.messages import Named
from pinaivu_box.engine.named_prefixes import NamedPrefixes
from pinaivu_box.engine.own_templates import CHATML
from tests.support.engine_harness import Template, add, make, run

TEXT = "You are the assistant of ACME.\nNever say 7391-XQ."
TEMPLATES = sorted((Path(__file__).parent.parent / "templates").glob("*.jinja"))
FUNCTION = {"name": "weather", "description": "", "parameters": {"type": "object"}}
DATED = "{{ strftime_now('%d %B %Y') }} {% for m in messages %}{{ m.content }}{% endfor %}"


def letters(text: str) -> list[int]:
    return list(text.encode())


def words(text: str) -> list[int]:
    """A token is all that stands between two spaces, and knows what it is."""
    return [hash(word) for word in text.split(" ")]


def template(source: str = CHATML) -> Template:
    return Template(source, bos="<s>", eos="</s>")


def says(system: str, user: str = "Hi") -> list[dict[str, Any]]:
    return [{"role": "system", "content": system}, {"role": "user", "content": user}]


def length(known: NamedPrefixes, tokens: list[int]) -> int:
    """How many of the first tokens are named."""
    share = known.share("s", tokens)
    assert share.scope == "s" and bool(share.common) == bool(share.public)
    return share.public


def end_of(prompt: str, text: str) -> int:
    """Where the text ends in the prompt, in bytes."""
    return len(prompt[: prompt.index(text) + len(text)].encode())


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
@pytest.mark.parametrize("more", ["", "\n\nThe customer is called Bob."])
@pytest.mark.parametrize("functions", [[], [FUNCTION]], ids=["", "tools"])
@pytest.mark.parametrize(
    "variables", [{}, {"enable_thinking": False, "reasoning_effort": "low"}], ids=["", "effort"]
)
def test_a_system_prompt_is_recognised_in_every_template(
    path: Path, more: str, functions: list[Any], variables: dict[str, Any]
) -> None:
    made = template(path.read_text())
    known = NamedPrefixes([TEXT], made, letters)
    prompt = made.render(says(TEXT + more), functions, variables)
    before = prompt[: prompt.index(TEXT)]
    if "weather" in before:  # tools come first: what is before the text is not the operator's
        assert length(known, letters(prompt)) == 0
    else:
        assert length(known, letters(prompt)) == end_of(prompt, TEXT)
    # A text that is nearly it is not it.
    for wrong in (TEXT[:-1], TEXT[:-2] + "!.", "x" + TEXT):
        assert length(known, letters(made.render(says(wrong + more), functions, variables))) == 0


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_a_first_message_is_recognised_too(path: Path) -> None:
    made = template(path.read_text())
    prompt = made.render([{"role": "user", "content": TEXT + " And now?"}])
    known = NamedPrefixes([TEXT], made, letters)
    assert length(known, letters(prompt)) == end_of(prompt, TEXT)
    later = [*says("Hello"), {"role": "assistant", "content": "Yes?"}]
    later.append({"role": "user", "content": TEXT})
    assert length(known, letters(made.render(later))) == 0


def test_raw_prompts_begin_with_it_as_well() -> None:
    known = NamedPrefixes([TEXT], template(), letters)
    assert length(known, letters(TEXT + " and more")) == len(TEXT)
    assert length(known, letters(TEXT[:-1])) == length(known, letters("x" + TEXT)) == 0
    assert length(known, []) == 0


def test_of_several_the_longest_counts() -> None:
    known = NamedPrefixes(["abc", "abcdef", "xyz"], template(), letters)
    found = {text: length(known, letters(text)) for text in ("abcd", "abcdefg", "abc", "xyz", "ab")}
    assert found == {"abcd": 3, "abcdefg": 6, "abc": 3, "xyz": 3, "ab": 0}
    scopes = {known.share("s", letters(text)).common for text in ("abcd", "abcdef", "xyz", "ab")}
    assert len(scopes) == 4 and "" in scopes


def test_it_is_cut_at_the_last_token_that_nothing_changes() -> None:
    """The last word may go on: it is a token only once it has ended."""
    known = NamedPrefixes(["one two three"], template(), words)
    assert length(known, words("one two three four")) == 2
    assert length(known, words("one two threefold")) == 2
    assert length(known, words("one twofold")) == 0


def test_a_template_that_writes_the_date_is_read_anew_each_day(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Clock(datetime):
        day = 1

        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return datetime(2026, 5, cls.day, tzinfo=tz or UTC)

    monkeypatch.setattr(named_prefixes, "datetime", Clock)
    monkeypatch.setattr("pinaivu_box.engine.chat_template.datetime", Clock)
    made = template(DATED)
    known = NamedPrefixes([TEXT], made, letters)
    for Clock.day in (1, 2, 3):
        prompt = made.render(says(TEXT))
        assert length(known, letters(prompt)) == end_of(prompt, TEXT)


def test_a_template_that_objects_names_nothing() -> None:
    """But what is raw needs no template."""
    known = NamedPrefixes([TEXT], template("{{ raise_exception('no') }}"), letters)
    assert length(known, letters(TEXT)) == len(TEXT)
    assert length(known, letters("no")) == 0


def test_an_engine_shares_it_between_those_who_say_so_until_it_is_told_otherwise() -> None:
    engine, _ = make(context=400)
    shared = template().render(says(TEXT))
    common = end_of(shared, TEXT)

    def found(name: str, **more: Any) -> int:
        asked = add(name, "Hi", 3, before=says(TEXT)[:1], **more)
        return run(engine, [asked]).cached[name][0]

    assert found("a", scope="a", named=True) == 0  # nothing is named yet
    engine.receive(Named([TEXT, "Another"]))
    assert found("b", scope="b", named=True) == 0  # the first one to compute it so
    assert found("c", scope="c", named=True) == common
    assert found("d", scope="d") == 0
    assert found("e", scope="", named=True) == 0
    assert found("f", scope="c", named=True) > common
    engine.receive(Named([]))
    assert found("g", scope="g", named=True) == 0
