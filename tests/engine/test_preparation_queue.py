"""Requests are prepared and grammars compiled beside everything else: nobody waits for another
tenant's, and a cancellation ends either.

What takes long here is ready when the test says so: nothing depends on time.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any

import pytest

from pinaivu_box.engine import engine, grammar, preparation_queue
from pinaivu_box.engine.embeddings import EmbeddingJob
from pinaivu_box.engine.fake_runner import FakeRunner
from pinaivu_box.engine.messages import Cancel, Constraint, Embed, Refused, Tokenize
from pinaivu_box.engine.output import OutputBuffer
from pinaivu_box.engine.preparation_queue import PreparationQueue
from pinaivu_box.engine.request_preparer import PreparedRequest, RequestPreparer
from pinaivu_box.engine.sequence import Sequence
from tests.support.engine_harness import add, in_this_process, load

PATIENCE = 60  # seconds until a test gives up; nothing is measured
LETTERS = Constraint("regex", "[ab]{3}")


class Door:
    """A queue whose prompts and grammars named in `ready` wait for those events."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, threads: int = 1) -> None:
        monkeypatch.setattr(preparation_queue, "_COMPILING_THREADS", threads)
        self.ready: dict[str, threading.Event] = {}
        self.said: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.scheduled: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.runner = FakeRunner(load())
        preparer = RequestPreparer(self.runner, in_this_process(), load(drafting=False))
        self.take = PreparationQueue(preparer, self.said.put, self.scheduled.put).take
        make = grammar.GrammarCompiler.compile

        def held_up(its: Any, wanted: Any, *more: Any) -> Any:
            event = self.ready.get(wanted.constraint.text)
            assert event is None or event.wait(PATIENCE)
            return make(its, wanted, *more)

        monkeypatch.setattr(grammar.GrammarCompiler, "compile", held_up)
        tokenize = self.runner.tokenize

        def held_up_too(text: str, **options: Any) -> list[int]:
            event = self.ready.get(text)
            if event is not None:
                self.begun.put(text)
                assert event.wait(PATIENCE)
            return tokenize(text, **options)

        monkeypatch.setattr(self.runner, "tokenize", held_up_too)
        self.begun: queue.SimpleQueue[str] = queue.SimpleQueue()

    def hold(self, held: Constraint | str) -> Callable[[], None]:
        """Until what it returns is called."""
        name = held if isinstance(held, str) else held.text
        event = self.ready[name] = threading.Event()
        return event.set

    def hears(self, count: int) -> list[Any]:
        return [self.said.get(timeout=PATIENCE) for _ in range(count)]

    def schedules(self, count: int) -> list[Any]:
        return [self.scheduled.get(timeout=PATIENCE) for _ in range(count)]


@pytest.fixture
def door(monkeypatch: pytest.MonkeyPatch) -> Door:
    return Door(monkeypatch)


def name_of(item: Any) -> str:
    return item.admitted.id if isinstance(item, PreparedRequest) else item.id


def test_a_request_does_not_wait_for_the_grammar_of_another(door: Door) -> None:
    """Beginnings, embeddings, tokens and cancellations go past it."""
    release = door.hold(LETTERS)
    door.take(add("slow", constraint=LETTERS))
    door.take(add("quick"))
    door.take(Embed("vectors", ["text"]))
    door.take(Tokenize(add("tokens", prompt="text")))
    assert {name_of(one) for one in door.hears(4)} == {"slow", "quick", "vectors", "tokens"}
    door.take(Cancel("quick"))
    passed = door.schedules(3)
    assert {type(one) for one in passed} == {Sequence, EmbeddingJob, Cancel}
    assert isinstance(passed[2], Cancel)
    assert door.scheduled.empty() and door.said.empty()
    release()
    slow = door.scheduled.get(timeout=PATIENCE)
    assert slow.id == "slow" and slow.grammar.allows(ord("a")) and not slow.grammar.allows(ord("c"))
    assert door.said.empty()


def test_a_small_grammar_passes_a_large_one(monkeypatch: pytest.MonkeyPatch) -> None:
    door = Door(monkeypatch, threads=2)
    release = door.hold(LETTERS)
    door.take(add("large", constraint=LETTERS))
    small = Constraint("regex", "[cd]{3}")
    door.take(add("waits", constraint=small))  # it is of the same tenant
    door.take(add("small", constraint=small, tenant="another"))
    assert door.scheduled.get(timeout=PATIENCE).id == "small"
    assert len(door.hears(3)) == 3 and door.scheduled.empty()
    release()
    assert [one.id for one in door.schedules(2)] == ["large", "waits"]


def test_a_tenant_does_not_wait_for_the_prompt_of_another(door: Door) -> None:
    """Of one tenant one is prepared at a time, in their order; others' go past them."""
    release = door.hold("long")
    for name in ("first", "second", "third"):
        door.take(add(name, prompt="long", tenant="slow"))
    door.take(add("quick"))
    door.take(Embed("vectors", ["text"], tenant="quick"))
    assert {name_of(one) for one in door.hears(2)} == {"quick", "vectors"}
    assert door.begun.get(timeout=PATIENCE) and door.begun.empty()
    release()
    assert [name_of(one) for one in door.hears(3)] == ["first", "second", "third"]


@pytest.mark.parametrize("begun", [True, False])
def test_a_request_cancelled_during_preparation_ends_at_once(door: Door, begun: bool) -> None:
    release = door.hold("long")
    door.take(add("before", prompt="long"))
    assert door.begun.get(timeout=PATIENCE)
    gone = "before" if begun else "gone"
    door.take(add("gone", prompt="text"))
    door.take(Cancel(gone))
    (refused,) = door.hears(1)
    assert isinstance(refused, Refused) and refused.id == gone
    assert door.scheduled.empty()
    release()
    left = "gone" if begun else "before"
    assert [name_of(one) for one in door.hears(1)] == [left]
    assert [one.id for one in door.schedules(1)] == [left]


@pytest.mark.parametrize("constraint", [LETTERS, Constraint("regex", "(?=a)b")])
@pytest.mark.parametrize("started", [True, False])
def test_a_request_cancelled_before_its_grammar_is_compiled_never_runs(
    door: Door, constraint: Constraint, started: bool
) -> None:
    """Nor is it refused: it was cancelled, whether its grammar was begun or not."""
    before = Constraint("regex", "[xy]")
    releases = [door.hold(before), door.hold(constraint)]
    if not started:
        door.take(add("before", constraint=before))
    door.take(add("gone", constraint=constraint))
    told = door.hears(1 if started else 2)
    door.take(Cancel("gone"))
    door.take(add("after", constraint=Constraint("regex", "[ab]{9}")))
    for release in releases:
        release()
    driven, output = engine.Engine(door.runner, token_budget=32), OutputBuffer()
    arrived = []
    while "after" not in arrived:
        item = door.scheduled.get(timeout=PATIENCE)
        arrived.append(item.id)
        if isinstance(item, Cancel):
            driven.end(item.id, "cancelled")
    assert arrived == (["gone", "after"] if started else ["gone", "before", "after"])
    for item in [*told, *door.hears(1)]:
        assert not isinstance(item, Refused)
        output.take(item)
    assert door.said.empty()
    output.take(driven.step())
    (delta,) = output.frame().deltas
    assert (delta.id, delta.finish_reason, delta.tokens) == ("gone", "cancelled", [])


def test_a_grammar_that_is_none_is_refused_after_its_prompt_was_read(door: Door) -> None:
    door.take(add("r", constraint=Constraint("regex", "(?=a)b")))
    assert isinstance(door.said.get(timeout=PATIENCE), PreparedRequest)
    refused = door.said.get(timeout=PATIENCE)
    assert isinstance(refused, Refused) and refused.param == "grammar"
    assert door.scheduled.empty()
