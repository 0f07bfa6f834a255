"""Long prompts are read beside everything else: each is read when the test says so."""

from __future__ import annotations

import queue
import threading
from typing import Any

import pytest

from pinaivu_box.engine.arrivals import Arrivals
from pinaivu_box.engine.embeddings import Embedding
from pinaivu_box.engine.fake_runner import FakeRunner
from pinaivu_box.engine.intake import Arrival, Intake
from pinaivu_box.engine.messages import Cancel, Embed, Refused, Tokenize, Tokenized
from pinaivu_box.engine.runner import TooManyTokens
from pinaivu_box.engine.sequence import Sequence
from pinaivu_box.errors import ContextOverflow, InvalidBody, NoNodesAvailable
from tests.engine.harness import add, load

PATIENCE = 60  # seconds until a test gives up; nothing is measured


class SlowReader(FakeRunner):
    """Says which text it has begun to read, and waits for leave to go on."""

    def __init__(self) -> None:
        super().__init__(load())
        self.begun: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.leave: dict[str, threading.Event] = {}

    def tokenize(self, text: str, most: int | None = None) -> list[int]:
        if text in self.leave:
            self.begun.put(text)
            assert self.leave[text].wait(PATIENCE)
        return super().tokenize(text, most)


class Door:
    def __init__(self) -> None:
        self.runner = SlowReader()
        self.said: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.scheduled: queue.SimpleQueue[Any] = queue.SimpleQueue()
        intake = Intake(self.runner, drafting=False, context_shift=False)
        self.take = Arrivals(intake, self.said.put, self.scheduled.put).take

    def long(self, name: str, tenant: str) -> None:
        """A prompt that is its name."""
        self.runner.leave[name] = threading.Event()
        self.take(add(name, prompt=name, tenant=tenant), long=True)

    def begun(self) -> str:
        return self.runner.begun.get(timeout=PATIENCE)

    def read(self, name: str) -> None:
        """And all that comes of it."""
        self.runner.leave[name].set()
        arrival = self.said.get(timeout=PATIENCE)
        assert isinstance(arrival, Arrival) and arrival.admitted.id == name
        assert self.scheduled.get(timeout=PATIENCE).id == name


@pytest.fixture
def door() -> Door:
    return Door()


def test_nobody_waits_for_another_s_long_prompt(door: Door) -> None:
    door.long("long", "a")
    assert door.begun() == "long"
    door.take(add("quick"))
    door.take(Embed("vectors", ["text"]))
    door.take(Tokenize(add("tokens", prompt="text")))
    door.take(Cancel("quick"))
    kinds = [type(door.said.get_nowait()) for _ in range(3)]
    assert kinds == [Arrival, Arrival, Tokenized]
    passed = [type(door.scheduled.get_nowait()) for _ in range(3)]
    assert passed == [Sequence, Embedding, Cancel]
    door.read("long")


def test_a_tenant_s_long_prompts_are_read_one_at_a_time(door: Door) -> None:
    """Others' come between, in the order of who was served longest ago."""
    for name in ("a1", "a2", "a3"):
        door.long(name, "a")
    assert door.begun() == "a1"
    for name, tenant in (("b1", "b"), ("b2", "b"), ("c1", "c")):
        door.long(name, tenant)
    assert door.begun() == "b1"  # there are two threads, but the other two of a's wait
    order = []
    for done in ("b1", "c1", "a1"):
        door.read(done)
        order.append(door.begun())
    assert order == ["c1", "b2", "a2"]
    for name in ("b2", "a2"):
        door.read(name)
    assert door.begun() == "a3"
    door.read("a3")


@pytest.mark.parametrize("begun", [True, False])
def test_who_is_cancelled_before_it_is_read_never_runs(door: Door, begun: bool) -> None:
    if not begun:
        door.long("before", "a")
        assert door.begun() == "before"
    door.long("gone", "a")
    if begun:
        assert door.begun() == "gone"
    door.take(Cancel("gone"))
    refused = door.said.get_nowait()
    assert isinstance(refused, Refused)
    assert (refused.id, refused.code) == ("gone", NoNodesAvailable.code)
    door.long("after", "a")
    door.runner.leave["gone"].set()
    if not begun:
        door.read("before")
    assert door.begun() == "after"  # without a word of the other
    door.read("after")
    assert door.said.empty() and door.scheduled.empty()


# -- how much of it --------------------------------------------------------------------------------


class Counted(FakeRunner):
    """Counts the letters that it tokenizes."""

    letters = 0

    def tokenize(self, text: str, most: int | None = None) -> list[int]:
        self.letters += len(text)
        return super().tokenize(text, most)


@pytest.fixture
def runner() -> Counted:
    return Counted(load(context=1000))


@pytest.fixture
def intake(runner: Counted) -> Intake:
    return Intake(runner, drafting=True, context_shift=False)


def test_what_cannot_fit_is_not_tokenized(runner: Counted, intake: Intake) -> None:
    text = "a" * 5_000_000
    for message in (
        add("r", prompt=text),
        add("r", text),
        Embed("r", [text]),
        add("r", prompt="a", prediction=text),
    ):
        refused = intake.prepare(message)
        assert isinstance(refused, Refused)
        assert refused.code in (ContextOverflow.code, InvalidBody.code)
        assert str(len(text))[:2] in refused.message and len(refused.message) < 200
    asked = intake.tokenize(Tokenize(add("r", prompt=text)))
    assert isinstance(asked, Refused) and asked.code == ContextOverflow.code
    plain = intake.tokenize(Tokenize(add("r", prompt=text), plain=True))
    assert isinstance(plain, Refused) and plain.param == "text"
    assert runner.letters < 1000
    with pytest.raises(TooManyTokens):
        runner.tokenize(text, 1000)


def test_a_count_has_no_bound(intake: Intake) -> None:
    text = "a" * 5_000_000
    asked = Tokenize(add("r", prompt=text), count=True)
    assert intake.tokenize(asked) == Tokenized("r", [], count=len(text))
    asked = Tokenize(add("r", prompt="abc"), count=True)
    counted = intake.tokenize(asked)
    assert isinstance(counted, Tokenized) and (counted.number, counted.tokens) == (3, [])


def test_tokens_are_spelled_as_one_text(intake: Intake) -> None:
    tokens = [*"é😀a".encode(), 256, 255]
    spelled = intake.tokenize(Tokenize(add("r"), tokens))
    assert isinstance(spelled, Tokenized) and spelled.text == "é😀a\ufffd"
    assert spelled.tokens == tokens
