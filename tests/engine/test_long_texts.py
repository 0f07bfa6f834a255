"""How much of a long text is read: never more than can be of use."""

from __future__ import annotations

import pytest

from pinaivu_box.engine.fake_runner import FakeRunner
from pinaivu_box.engine.messages import Embed, Refused, Tokenize, Tokenized
from pinaivu_box.engine.request_preparer import RequestPreparer
from pinaivu_box.engine.runner import TooManyTokens
from pinaivu_box.errors import ContextOverflow
from tests.support.engine_harness import add, in_this_process, load


class Counted(FakeRunner):
    """Counts the letters that it tokenizes."""

    letters = 0

    def tokenize(self, text: str, limit: int | None = None, *, special: bool = True) -> list[int]:
        self.letters += len(text)
        return super().tokenize(text, limit)


@pytest.fixture
def runner() -> Counted:
    return Counted(load(context=1000))


@pytest.fixture
def preparer(runner: Counted) -> RequestPreparer:
    return RequestPreparer(runner, in_this_process(), load())


def test_a_text_that_cannot_fit_is_not_tokenized(
    runner: Counted, preparer: RequestPreparer
) -> None:
    text = "a" * 5_000_000
    for message in (
        add("r", prompt=text),
        add("r", text),
        Embed("r", [text]),
    ):
        refused = preparer.prepare(message)
        assert isinstance(refused, Refused)
        assert refused.code == ContextOverflow.code
        assert len(refused.message) < 400
    asked = preparer.tokenize(Tokenize(add("r", prompt=text)))
    assert isinstance(asked, Refused) and asked.code == ContextOverflow.code
    plain = preparer.tokenize(Tokenize(add("r", prompt=text), plain=True))
    assert isinstance(plain, Refused) and plain.param == "text"
    assert runner.letters < 1000
    with pytest.raises(TooManyTokens):
        runner.tokenize(text, 1000)


def test_a_count_has_no_bound(preparer: RequestPreparer) -> None:
    text = "a" * 5_000_000
    asked = Tokenize(add("r", prompt=text), count=True)
    assert preparer.tokenize(asked) == Tokenized("r", [], count=len(text))
    asked = Tokenize(add("r", prompt="abc"), count=True)
    counted = preparer.tokenize(asked)
    assert isinstance(counted, Tokenized) and (counted.number, counted.tokens) == (3, [])


def test_tokens_are_spelled_as_one_text(preparer: RequestPreparer) -> None:
    tokens = [*"é😀a".encode(), 256, 255]
    spelled = preparer.tokenize(Tokenize(add("r"), tokens))
    assert isinstance(spelled, Tokenized) and spelled.text == "é😀a\ufffd"
    assert spelled.tokens == tokens
