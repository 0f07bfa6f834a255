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
from pinaivu_box.engine.messages import Cancel, Constraint, Embed, Output, Refused, Tokenize
from pinaivu_box.engine.output import OutputBuffer
from pinaivu_box.engine.request_preparer import PreparedRequest, RequestPreparer
from pinaivu_box.engine.sequence import Sequence
from tests.support.engine_harness import add, in_this_process, load
from tests.support.preparation_driver import PATIENCE_SECONDS, PreparationDriver, name_of

LETTERS = Constraint("regex", "[ab]{3}")


class HeldDriver(PreparationDriver):
    """Its prompts and grammars that are named in `ready` wait for those events."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, threads: int = 1) -> None:
        monkeypatch.setattr(preparation_queue, "_COMPILING_THREADS", threads)
        self.ready: dict[str, threading.Event] = {}
        self.runner = FakeRunner(load())
        super().__init__(RequestPreparer(self.runner, in_this_process(), load(drafting=False)))
        make = grammar.GrammarCompiler.compile

        def held_up(its: Any, wanted: Any, *more: Any) -> Any:
            event = self.ready.get(wanted.constraint.text)
            assert event is None or event.wait(PATIENCE_SECONDS)
            return make(its, wanted, *more)

        monkeypatch.setattr(grammar.GrammarCompiler, "compile", held_up)
        tokenize = self.runner.tokenize

        def held_up_too(text: str, **options: Any) -> list[int]:
            event = self.ready.get(text)
            if event is not None:
                self.begun.put(text)
                assert event.wait(PATIENCE_SECONDS)
            return tokenize(text, **options)

        monkeypatch.setattr(self.runner, "tokenize", held_up_too)
        self.begun: queue.SimpleQueue[str] = queue.SimpleQueue()

    def hold(self, held: Constraint | str) -> Callable[[], None]:
        """Until what it returns is called."""
        name = held if isinstance(held, str) else held.text
        event = self.ready[name] = threading.Event()
        return event.set

    def next_names(self, count: int) -> list[str]:
        """Of the requests that are reported next."""
        return [name_of(self.next_reported()) for _ in range(count)]


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> HeldDriver:
    return HeldDriver(monkeypatch)


def test_a_request_does_not_wait_for_the_grammar_of_another(driver: HeldDriver) -> None:
    """Beginnings, embeddings, tokens and cancellations go past it."""
    release = driver.hold(LETTERS)
    driver.take(add("slow", constraint=LETTERS))
    driver.take(add("quick"))
    driver.take(Embed("vectors", ["text"]))
    driver.take(Tokenize(add("tokens", prompt="text")))
    assert set(driver.next_names(4)) == {"slow", "quick", "vectors", "tokens"}
    driver.take(Cancel("quick"))
    passed = [driver.next_scheduled() for _ in range(3)]
    assert {type(one) for one in passed} == {Sequence, EmbeddingJob, Cancel}
    assert isinstance(passed[2], Cancel)
    assert driver.scheduled.empty() and driver.reported.empty()
    release()
    slow = driver.next_scheduled()
    assert slow.id == "slow" and slow.grammar.allows(ord("a")) and not slow.grammar.allows(ord("c"))
    assert driver.reported.empty()


def test_a_small_grammar_passes_a_large_one(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = HeldDriver(monkeypatch, threads=2)
    release = driver.hold(LETTERS)
    driver.take(add("large", constraint=LETTERS))
    small = Constraint("regex", "[cd]{3}")
    driver.take(add("waits", constraint=small))  # it is of the same tenant
    driver.take(add("small", constraint=small, tenant="another"))
    assert driver.next_scheduled().id == "small"
    assert len(driver.next_names(3)) == 3 and driver.scheduled.empty()
    release()
    assert [driver.next_scheduled().id for _ in range(2)] == ["large", "waits"]


def test_a_tenant_does_not_wait_for_the_prompt_of_another(driver: HeldDriver) -> None:
    """Of one tenant one is prepared at a time, in their order; others' go past them."""
    release = driver.hold("long")
    for name in ("first", "second", "third"):
        driver.take(add(name, prompt="long", tenant="slow"))
    driver.take(add("quick"))
    driver.take(Embed("vectors", ["text"], tenant="quick"))
    assert set(driver.next_names(2)) == {"quick", "vectors"}
    assert driver.begun.get(timeout=PATIENCE_SECONDS) and driver.begun.empty()
    release()
    assert driver.next_names(3) == ["first", "second", "third"]


@pytest.mark.parametrize("begun", [True, False])
def test_a_request_cancelled_during_preparation_ends_at_once(
    driver: HeldDriver, begun: bool
) -> None:
    release = driver.hold("long")
    driver.take(add("before", prompt="long"))
    assert driver.begun.get(timeout=PATIENCE_SECONDS)
    gone = "before" if begun else "gone"
    driver.take(add("gone", prompt="text"))
    driver.take(Cancel(gone))
    refused = driver.next_reported()
    assert isinstance(refused, Refused) and refused.id == gone
    assert driver.scheduled.empty()
    release()
    left = "gone" if begun else "before"
    assert name_of(driver.next_reported()) == driver.next_scheduled().id == left


@pytest.mark.parametrize("constraint", [LETTERS, Constraint("regex", "(?=a)b")])
@pytest.mark.parametrize("started", [True, False])
def test_a_request_cancelled_before_its_grammar_is_compiled_never_runs(
    driver: HeldDriver, constraint: Constraint, started: bool
) -> None:
    """Nor is it refused: it was cancelled, whether its grammar was begun or not."""
    before = Constraint("regex", "[xy]")
    releases = [driver.hold(before), driver.hold(constraint)]
    if not started:
        driver.take(add("before", constraint=before))
    driver.take(add("gone", constraint=constraint))
    reported = [driver.next_reported() for _ in range(1 if started else 2)]
    driver.take(Cancel("gone"))
    driver.take(add("after", constraint=Constraint("regex", "[ab]{9}")))
    for release in releases:
        release()
    driven, output = engine.Engine(driver.runner, token_budget=32), OutputBuffer()
    arrived = []
    while "after" not in arrived:
        item = driver.next_scheduled()
        arrived.append(item.id)
        if isinstance(item, Cancel):
            driven.end(item.id, "cancelled")
    assert arrived == (["gone", "after"] if started else ["gone", "before", "after"])
    for item in [*reported, driver.next_reported()]:
        assert not isinstance(item, Refused)
        output.take(item)
    assert driver.reported.empty()
    output.take(driven.step())
    assert output.frame().outputs == {"gone": Output("", [], "cancelled")}


def test_a_grammar_that_is_none_is_refused_after_its_prompt_was_read(driver: HeldDriver) -> None:
    driver.take(add("r", constraint=Constraint("regex", "(?=a)b")))
    assert isinstance(driver.next_reported(), PreparedRequest)
    refused = driver.next_reported()
    assert isinstance(refused, Refused) and refused.param == "grammar"
    assert driver.scheduled.empty()
