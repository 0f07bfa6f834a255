"""Computing an answer again, over a model whose words depend on how each of its cells was computed:
each draw and each number is that of the first time, whatever the first engine did beside it."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from pinaivu_box.engine.fake_runner import END
from pinaivu_box.engine.messages import Add, Cancel, Constraint, ReplayedToken
from tests.support.engine_harness import Heard, add, finish, run, sampling
from tests.support.exact_runner import LONG, made, others

Change = dict[str, Any]


def asked(**more: Any) -> Add:
    return add("r", more.pop("text", LONG), **{"max_tokens": 150, "seed": 7, **more})


def again(request: Add, tokens: list[int], **more: Any) -> Add:
    return msgspec.structs.replace(request, replay=tokens, tenant="audit", scope="", **more)


def check(first: Heard, request: Add, **more: Any) -> Heard:
    """What was heard is what another engine computes again."""
    tokens = first.tokens["r"]
    second = run(made(budget=100, **more)[0], [again(request, tokens)])
    assert not second.refused
    assert [each.recorded for each in second.replayed["r"]] == tokens == second.tokens["r"]
    assert [each.drawn for each in second.replayed["r"]] == tokens
    assert second.numbers["r"] == first.numbers["r"]
    assert second.text["r"] == first.text["r"]
    assert all((each.margin, each.possible) == (0, True) for each in second.replayed["r"])
    return second


WAYS: dict[str, Change] = {
    "greedy": {"sampling": sampling(0.0)},
    "hot, and without top-k": {"sampling": sampling(1.5, top_k=0, top_p=0.99, min_p=0.0)},
    "typical": {"sampling": sampling(typical_p=0.4)},
    "penalties": {"sampling": sampling(frequency_penalty=1.0, presence_penalty=1.0,
                                       repeat_penalty=1.2)},
    "biases": {"sampling": sampling(logit_bias={str(ord("e")): 4.0, str(ord("x")): -100.0})},
    "a short prompt": {"text": "Hi"},
    "a grammar": {"constraint": Constraint("regex", "(The (cat|dog) [a-z]{3,9}\\. ){9}")},
    "a schema": {"constraint": Constraint("json_schema", '{"type":"object","properties":'
                 '{"a_long_name":{"type":"string","maxLength":9}},"required":["a_long_name"]}')},
    "log-probabilities": {"logprobs": 3, "echo": True},
    "one token": {"max_tokens": 1},
}  # fmt: skip


@pytest.mark.parametrize("draft", [0, 6])
@pytest.mark.parametrize("way", WAYS.values(), ids=[*WAYS])
def test_every_draw_and_number_is_the_same(way: Change, draft: int) -> None:
    request = asked(**way)
    first = run(made(draft=draft)[0], [*others(7), request, *others(3)[1:0]])
    second = check(first, request)
    expected = first.ends["r"]
    assert second.ends["r"] == expected


def test_nothing_was_asked_for() -> None:
    second = run(made()[0], [again(asked(max_tokens=0), [])])
    assert (second.tokens["r"], second.ends["r"]) == ([], "length")


def test_an_end_token_ends_it() -> None:
    request = asked(sampling=sampling(1.3, logit_bias={str(END): 3.0}, min_tokens=12))
    first = run(made(can_end=True)[0], [request])
    assert first.ends["r"] == "stop" and first.tokens["r"][-1] == END
    assert len(first.tokens["r"]) >= 12
    assert check(first, request, can_end=True).ends["r"] == "stop"


def test_a_stop_string_ends_it() -> None:
    whole = run(made()[0], [asked()])
    request = asked(stop=[whole.text["r"][40:43]])
    first = run(made(draft=9)[0], [request])
    assert len(first.tokens["r"]) < 60 and first.ends["r"] == "stop"
    assert check(first, request).ends["r"] == "stop"


def test_one_that_was_cancelled_in_the_middle() -> None:
    engine, _ = made()
    first = Heard()
    engine.receive(asked())
    for _ in range(20):
        first.take(engine.step())
    engine.receive(Cancel("r"))
    while engine.busy:
        first.take(engine.step())
    assert check(first, asked()).ends["r"] == "length"  # it would have gone on


@pytest.mark.parametrize("pool", [False, True])
def test_one_that_was_preempted(pool: bool) -> None:
    engine, _ = made(pool=pool)
    first = Heard()
    engine.receive(add("old", "x" * 200, 300))
    engine.receive(asked(logprobs=2))  # steps without a plan cannot be interrupted
    for length in (9, 40, 77):
        while len(first.tokens.get("r", [])) < length:
            first.take(engine.step())
        assert engine.scheduler.reclaim()  # the youngest: there is nothing else
    finish(engine, first)
    assert engine.scheduler.preemptions == 3
    check(first, asked())


@pytest.mark.parametrize("cut", [0, 1, 63, 64, 100])
def test_one_that_another_engine_has_gone_on_with(cut: int) -> None:
    """It is computed again as one; each leg has committed to its own numbers."""
    whole = run(made()[0], [asked()])
    rest = msgspec.structs.replace(asked(), output=whole.tokens["r"][:cut])
    second = run(made(draft=3)[0], [rest])
    assert whole.tokens["r"][:cut] + second.tokens["r"] == whole.tokens["r"]
    check(whole, asked())


def test_one_with_context_shifts() -> None:
    request = asked(text="x" * 70, max_tokens=300)
    first = run(made(context=200, shift=True, draft=5)[0], [request])
    assert first.shifted["r"][-1] > 100 and first.ends["r"] == "length"
    check(first, request, context=200, shift=True)


def test_it_is_the_same_beside_others_that_are_served() -> None:
    """In an engine that serves, too."""
    first = run(made()[0], [asked()])
    engine, _ = made(draft=4)
    second = run(engine, [*others(20), again(asked(), first.tokens["r"])])
    assert [each.drawn for each in second.replayed["r"]] == first.tokens["r"]
    assert second.numbers["r"] == first.numbers["r"]


def test_a_longer_answer_than_the_context_is_refused() -> None:
    refused = run(made(context=300)[0], [again(asked(), [65] * 100)]).refused["r"]
    assert refused.code == "context_length_exceeded"


# -- answers that are not what they are said to be -------------------------------------------------


def compared(tokens: list[int], request: Add | None = None, **more: Any) -> list[ReplayedToken]:
    return run(made(**more)[0], [again(request or asked(), tokens)]).replayed["r"]


def honest(request: Add | None = None) -> list[int]:
    return run(made()[0], [request or asked()]).tokens["r"]


@pytest.mark.parametrize("at", [0, 1, 62, 63, 64, 149])
def test_a_token_that_was_not_drawn_is_found_where_it_is(at: int) -> None:
    tokens = honest()
    other = ord("!") if tokens[at] != ord("!") else ord("?")
    told = compared([*tokens[:at], other, *tokens[at + 1 :]])
    first = next(number for number, each in enumerate(told) if each.drawn != each.recorded)
    assert first == at
    assert (told[at].recorded, told[at].drawn) == (other, tokens[at])
    assert told[at].margin > 0 or not told[at].possible


def test_a_token_that_truncation_leaves_out_is_not_possible() -> None:
    tokens = honest()
    tokens[30] = 200  # of which this model says e^-50
    each = compared(tokens)[30]
    assert not each.possible and each.margin > 20


def test_another_seed_is_found_at_once() -> None:
    told = compared(honest(asked(seed=8)))
    wrong = [number for number, each in enumerate(told) if each.drawn != each.recorded]
    assert wrong[0] < 10 and all(told[number].margin > 0 for number in wrong)


def test_a_banned_token_has_its_own_logit() -> None:
    """An end token before `min_tokens`: nothing else is said about it, and all the same."""
    request = asked(sampling=sampling(min_tokens=50))
    tokens = [*honest(request)[:20], END]
    each = compared(tokens, request, can_end=True)[-1]
    assert each.recorded == END and not each.possible and each.margin == float("inf")
    assert -20 < each.logit < 20


def test_what_comes_after_the_end_is_not_computed() -> None:
    tokens = honest()
    told = compared([*tokens[:40], END, *tokens[40:]])
    assert len(told) == 41


def test_a_token_that_the_grammar_forbids_is_the_last() -> None:
    request = asked(constraint=Constraint("regex", "[a-f]{80}"))
    tokens = honest(request)
    told = compared([*tokens[:33], ord("z"), *tokens[34:]], request)
    assert len(told) == 34 and not told[-1].possible and told[-1].drawn == tokens[33]
    assert all(each.drawn == each.recorded for each in told[:-1])


def test_a_context_shift_elsewhere_is_another_answer() -> None:
    request = asked(text="x" * 70, max_tokens=300)
    first = run(made(context=200, shift=True)[0], [request])
    told = compared(first.tokens["r"], request, context=210, shift=True)
    wrong = [number for number, each in enumerate(told) if each.drawn != each.recorded]
    assert wrong and wrong[0] == 200 - len(first.prompts["r"])
