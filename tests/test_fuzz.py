"""Small helpings of tests/fuzz: a box that is driven from its own document never breaks, and
answers keep to schemas."""

from __future__ import annotations

from pathlib import Path

from tests.fuzz.driver import Fuzzer, fake_box
from tests.fuzz.keeping import keep
from tests.support.process_box import Box


def test_nothing_that_the_document_allows_or_forbids_breaks_a_box(tmp_path: Path) -> None:
    box = fake_box(tmp_path / "home")
    try:
        fuzzer = Fuzzer(box, examples=3, seed=1)
        fuzzer.run()
        assert fuzzer.failures == []
        assert sum(fuzzer.answers.values()) > 200
        statuses = {status for _, status in fuzzer.answers}
        assert {200, 422} <= statuses
        assert box.chat("Still there?", model="fake:1", max_tokens=4).status_code == 200
    finally:
        box.end()


def test_answers_keep_to_random_schemas(box: Box) -> None:
    """20 of the 600 that tests/fuzz/keep_to_schemas asks for."""
    kept, refused, broken = keep(box, range(1000, 1020), [0])
    assert broken == []
    assert kept == 20 and refused == 0


def test_numbers_come_to_an_end(box: Box) -> None:
    """Seeds of answers that were cut off in the middle of a number's digits."""
    kept, refused, broken = keep(box, [47, 61, 101], [0, 1])
    assert broken == []
    assert kept == 6 and refused == 0
