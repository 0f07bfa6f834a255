"""Tokens to streamed text: whole characters, nothing lost, never a stop string."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pinaivu_box.engine.detokenizer import Detokenizer, text_of

# Few letters, so that stop strings are met, half met and overlap; some of several bytes.
LETTERS = st.sampled_from("abcé€😀")
TEXTS = st.text(LETTERS, max_size=30)
STOPS = st.lists(st.text(LETTERS, min_size=1, max_size=5), max_size=4)


@st.composite
def pieces(draw: st.DrawFn, texts: st.SearchStrategy[str] = TEXTS) -> list[bytes]:
    """A random text's bytes cut at random places, also inside characters; empty pieces too."""
    data = draw(texts).encode()
    cuts = sorted(draw(st.lists(st.integers(0, len(data)), max_size=len(data) + 2)))
    return [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]


def detokenizer(parts: list[bytes], stop: list[str], min_tokens: int = 0) -> Detokenizer:
    """Token n is the n-th part."""
    return Detokenizer(parts.__getitem__, stop, min_tokens)


def run(parts: list[bytes], stop: list[str], min_tokens: int = 0) -> list[str]:
    """What each push gave, then what flush gave; ends early when stopped, as an engine does."""
    made = detokenizer(parts, stop, min_tokens)
    given_out = []
    for token in range(len(parts)):
        given_out.append(made.push(token))
        if made.stopped:
            return given_out
    return [*given_out, made.flush()]


def before_stop(text: str, stop: list[str], least: int = 0) -> str:
    """The text before the stop string that was completed first (the longest, of several), not
    within the first characters."""
    for end in range(least and least + 1, len(text) + 1):
        starts = [end - len(s) for s in stop if text[:end].endswith(s)]
        if starts:
            return text[: min(starts)]
    return text


@settings(max_examples=1000)
@given(pieces(), STOPS)
@example([b"abca"], ["abca", "bc"])
def test_output_is_the_text_before_the_first_completed_stop(
    parts: list[bytes], stop: list[str]
) -> None:
    text = b"".join(parts).decode()
    out = "".join(run(parts, stop))
    assert out == before_stop(text, stop)
    assert not any(s in out for s in stop)


@settings(max_examples=1000)
@given(pieces(), STOPS, st.integers(0, 12))
@example([b"abc", b"c", b"b", b"c"], ["abcx", "bc"], 1)
def test_the_first_tokens_are_ended_by_no_stop_string(
    parts: list[bytes], stop: list[str], min_tokens: int
) -> None:
    text = b"".join(parts).decode()
    early = len(b"".join(parts[:min_tokens]).decode(errors="ignore"))
    out = "".join(run(parts, stop, min_tokens))
    # What is held back as the beginning of one may be cut off by it later.
    assert out == before_stop(text, stop, early)


@settings(max_examples=500)
@given(TEXTS, STOPS, st.data())
def test_output_does_not_depend_on_where_the_text_was_cut(
    text: str, stop: list[str], data: st.DataObject
) -> None:
    one = data.draw(pieces(st.just(text)))
    other = data.draw(pieces(st.just(text)))
    assert "".join(run(one, stop)) == "".join(run(other, stop))


@settings(max_examples=500)
@given(pieces(st.text(max_size=20).filter(lambda text: "\ufffd" not in text)), STOPS)
def test_split_characters_never_give_a_replacement_in_between(
    parts: list[bytes], stop: list[str]
) -> None:
    assert not any("\ufffd" in out for out in run(parts, stop))


@given(pieces(st.text(max_size=20)))
def test_without_stop_strings_each_character_goes_out_with_its_last_byte(
    parts: list[bytes],
) -> None:
    made = detokenizer(parts, [])
    seen, out = b"", ""
    for token, part in enumerate(parts):
        seen += part
        out += made.push(token)
        assert out == seen.decode(errors="ignore")  # all but an unfinished end
    assert not made.stopped and made.flush() == ""


@settings(max_examples=500)
@given(pieces(), STOPS)
def test_only_the_beginning_of_a_stop_string_is_withheld(
    parts: list[bytes], stop: list[str]
) -> None:
    made = detokenizer(parts, stop)
    seen, out = b"", ""
    for token, part in enumerate(parts):
        seen += part
        out += made.push(token)
        if made.stopped:
            return
        held = seen.decode(errors="ignore")[len(out) :]
        assert held == "" or any(s.startswith(held) and s != held for s in stop)


def test_every_stop_string_stops_and_nothing_comes_after_it() -> None:
    parts = [b"one ", b"tw", b"o END", b" three"]
    made = detokenizer(parts, ["never", "END"])
    assert [made.push(0), made.push(1)] == ["one ", "tw"]
    assert made.push(2) == "o "
    assert made.stopped
    assert made.push(3) == "" and made.flush() == ""


def test_a_stop_string_across_tokens_is_held_back_and_cut() -> None:
    parts = [b"yes<", b"|end", b"|>", b"no"]
    assert run(parts, ["<|end|>"]) == ["yes", "", ""]


def test_withheld_text_is_released_when_it_is_no_stop_string() -> None:
    assert run([b"a<|e", b"xit"], ["<|end|>"]) == ["a", "<|exit", ""]
    assert run([b"a<|e"], ["<|end|>"]) == ["a", "<|e"]


def test_a_stop_string_of_several_bytes_may_be_cut_inside_its_character() -> None:
    euro = "€".encode()
    assert run([b"1", euro[:1], euro[1:], b"2"], ["€"]) == ["1", "", ""]


@pytest.mark.parametrize("stop", [[], ["x"], ["ab"], ["😀"]])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_an_unfinished_character_at_the_end_is_no_text(stop: list[str], size: int) -> None:
    head = "😀".encode()[:size]
    assert "".join(run([b"a", head], stop)) == "a" == text_of(b"a" + head)
    assert "".join(run([b"a", head, b"b"], stop)) == "a\ufffdb"  # its rest did not come


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_character_that_the_prompt_has_begun_is_finished(size: int) -> None:
    data = "😀".encode()
    for rest, text in ((data[size:] + b"!", "😀!"), (b"", ""), (b"no", "no"), (data, "😀")):
        made = detokenizer([bytes([one]) for one in rest], [])
        made.follow(b"a" + data[:size])
        assert not made.holds
        assert "".join(map(made.push, range(len(rest)))) + made.flush() == text
    whole = detokenizer([b"b"], [])
    whole.follow("a😀".encode()[2:])  # tokens that begin in the middle of one
    assert whole.push(0) == "b"
