"""Frames: what was said since the last one, whole and once, however many steps that were."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pinaivu_box.engine.detokenizer import Detokenizer
from pinaivu_box.engine.fake_runner import END
from pinaivu_box.engine.messages import EngineLoad, Output, Prompt, Refused, StepFrame
from pinaivu_box.engine.output import OutputBuffer, SequenceOutput, StepOutput
from pinaivu_box.engine.request_preparer import PreparedRequest
from pinaivu_box.engine.runner import Float32
from tests.support.engine_harness import add, make
from tests.support.scheduler_driver import sequence


def piece(token: int) -> bytes:
    return bytes([token]) if token < END else b""


def arrival(name: str, stop: list[str] | None = None) -> PreparedRequest:
    scheduled = sequence(0, 2, 9)
    scheduled.id = name
    return PreparedRequest(Prompt([1, 2]), Detokenizer(piece, stop or []), scheduled)


def step(*said: SequenceOutput, steps: int = 1) -> StepOutput:
    return StepOutput([*map(with_logits, said)], EngineLoad(steps=steps))


def say(name: str, text: str, finish_reason: str | None = None) -> SequenceOutput:
    return with_logits(SequenceOutput(name, list(text.encode()), finish_reason))


def with_logits(said: SequenceOutput) -> SequenceOutput:
    return replace(said, logits=logits(*said.tokens))


def logits(*tokens: int) -> Float32:
    return np.array([token / 2 for token in tokens], np.float32)


def plain(steps: int = 1, **tokens: str) -> StepOutput:
    """A steady step: a token each."""
    each = [ord(token) for token in tokens.values()]
    return StepOutput([], EngineLoad(steps=steps), (list(tokens), each, logits(*each)))


def admitted(*names: str, stop: list[str] | None = None) -> OutputBuffer:
    output = OutputBuffer()
    for name in names:
        output.take(arrival(name, stop))
    output.frame()
    return output


def test_several_steps_make_one_delta_for_each_sequence() -> None:
    output = admitted("a", "b")
    first = SequenceOutput("a", [ord("x")], queue_ms=5.0, cached_tokens=3)
    assert output.take(step(first, say("b", "1"))) == []
    assert output.take(step(say("a", "yz"), say("b", "2"), steps=2)) == []
    assert output.take(plain(steps=3, a="!", b="3")) == []
    assert output.take(step(say("b", "4", "length"), steps=4)) == []
    frame = output.frame()
    assert frame.outputs == {
        "a": Output("xyz!", list(b"xyz!"), None, 5.0, 3),
        "b": Output("1234", list(b"1234"), "length"),
    }
    assert frame.load.steps == 4


def test_a_frame_says_nothing_twice() -> None:
    output = OutputBuffer()
    output.take(arrival("a"))
    output.take(Refused("b", "code", "why"))
    output.take(step(say("a", "x"), steps=7))
    first, second = output.frame(), output.frame()
    assert (len(first.prompts), len(first.refused), len(first.outputs)) == (1, 1, 1)
    assert second == StepFrame({}, [], {}, EngineLoad(steps=7))  # the load is the last known
    output.take(step(say("a", "y")))
    assert output.frame().outputs == {"a": Output("y", list(b"y"))}


@settings(max_examples=200)
@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.text("xyzä😀", min_size=1, max_size=4))),
    st.lists(st.booleans(), min_size=1),
    st.sampled_from([[], ["xy"], ["zz", "yx"], ["😀x"]]),
)
def test_frames_together_say_the_same_however_many_steps_each_holds(
    spoken: list[tuple[str, str]], framed: list[bool], stop: list[str]
) -> None:
    """`framed` says after which steps there is a frame."""

    def listen(often: list[bool]) -> tuple[dict[str, str], dict[str, list[int]], dict[str, str]]:
        output = admitted("a", "b", "c", stop=stop)
        text, ends = dict.fromkeys("abc", ""), dict[str, str]()
        tokens: dict[str, list[int]] = {name: [] for name in "abc"}
        for number, (name, words) in enumerate(spoken):
            output.take(step(say(name, words)))
            if often[number % len(often)] or number == len(spoken) - 1:
                for request_id, new in output.frame().outputs.items():
                    assert request_id not in ends, "output after the end"
                    text[request_id] += new.text
                    tokens[request_id] += new.tokens
                    if new.finish_reason:
                        ends[request_id] = new.finish_reason
        return text, tokens, ends

    assert listen(framed) == listen([True])


@pytest.mark.parametrize("steady", [True, False])
def test_a_stop_string_ends_a_sequence_before_the_engine_knows(steady: bool) -> None:
    """It is reported once; what the engine says until it hears of it is nothing to anybody."""
    output = admitted("a", "b", stop=["yz"])
    first, second = (
        (plain(a="y", b="y"), plain(a="z", b="w"))
        if steady
        else (step(say("a", "y"), say("b", "y")), step(say("a", "z"), say("b", "w")))
    )
    assert output.take(step(say("a", "x"), say("b", "x"))) == []
    assert output.take(first) == []
    assert output.take(second) == ["a"]
    assert output.take(plain(a="!", b="!")) == []
    assert output.take(step(say("a", "!", "length"), say("b", "?", "length"))) == []
    assert output.frame().outputs == {
        "a": Output("x", list(b"xyz"), "stop", stop_string="yz"),
        "b": Output("xyw!?", list(b"xyw!?"), "length"),
    }
    assert output.take(step(say("a", "!"))) == [] and output.frame().outputs == {}


def test_a_stop_string_inside_a_step_ends_it_there() -> None:
    """A step with an accepted draft has several tokens: those after the stop were never said."""
    output = admitted("a", stop=["yz"])
    assert output.take(step(SequenceOutput("a", list(b"xyzw"), "length"))) == ["a"]
    assert output.frame().outputs == {"a": Output("x", list(b"xyz"), "stop", stop_string="yz")}


def test_an_end_token_has_no_text() -> None:
    output = admitted("a")
    output.take(step(SequenceOutput("a", [*b"hi", END], "stop", end_token=True)))
    assert output.frame().outputs == {"a": Output("hi", [*b"hi", END], "stop")}


def test_withheld_text_comes_with_the_end() -> None:
    """The beginning of a stop string; a character that was never finished is no text."""
    output = admitted("a", "b", stop=["yz!"])
    output.take(step(say("a", "xyz"), SequenceOutput("b", [ord("x"), 0xC3])))
    assert [new.text for new in output.frame().outputs.values()] == ["x", "x"]
    output.take(step(SequenceOutput("a", [], "cancelled"), SequenceOutput("b", [], "length")))
    assert output.frame().outputs == {
        "a": Output("yz", [], "cancelled"),
        "b": Output("", [], "length"),
    }


def test_a_request_may_be_refused_after_it_was_admitted() -> None:
    """Its prompt did not fit into the cache after all: it says so, and no delta follows."""
    output = OutputBuffer()
    output.take(arrival("a"))
    output.take(Refused("a", "context_length_exceeded", "too long"))
    output.take(step(say("a", "late")))
    frame = output.frame()
    assert list(frame.prompts) == ["a"]
    assert [one.code for one in frame.refused] == ["context_length_exceeded"]
    assert frame.outputs == {}


def test_an_engine_refuses_an_admitted_request_that_does_not_fit() -> None:
    """And serves the next one."""
    engine, _ = make(cells=60)
    engine.receive(add("large", "x" * 100))
    frames = [engine.step()]
    while engine.busy:
        frames.append(engine.step())
    assert [name for frame in frames for name in frame.prompts] == ["large"]
    assert [one.code for frame in frames for one in frame.refused] == ["context_length_exceeded"]
    assert [frame.outputs for frame in frames if frame.outputs] == []
    engine.receive(add("small", "x", 3))
    while engine.busy:
        frames.append(engine.step())
    assert [new.finish_reason for new in frames[-1].outputs.values()] == ["length"]


def test_every_delta_says_how_many_tokens_were_forgotten() -> None:
    """Also in steps that forget nothing more."""
    output = admitted("a")
    output.take(step(SequenceOutput("a", [ord("x")], shifted_tokens=30)))
    assert output.frame().outputs["a"].shifted_tokens == 30
    output.take(step(SequenceOutput("a", [ord("y")], shifted_tokens=30)))
    output.take(step(SequenceOutput("a", [ord("z")], shifted_tokens=60)))
    assert output.frame().outputs["a"].shifted_tokens == 60
