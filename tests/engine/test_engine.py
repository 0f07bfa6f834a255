"""The token loop over runners that check what they are given."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest

from pinaivu_box.engine.fake_runner import END, SENTENCE, FakeRunner
from pinaivu_box.engine.messages import Cancel
from pinaivu_box.engine.runner import Batch
from tests.support.engine_harness import (
    BUDGET,
    Engine,
    Heard,
    add,
    alone,
    assert_only_kept,
    assorted,
    engine_prompt,
    load,
    make,
    run,
    sampling,
)

# -- batching --------------------------------------------------------------------------------------


def test_many_at_once_say_the_same_as_each_alone() -> None:
    adds = assorted(40)
    engine, runner = make(can_end=True)
    heard = run(engine, adds)
    assert {one.id: heard.answer(one.id) for one in adds} == alone(adds, can_end=True)
    assert {"stop", "length"} == set(heard.ends.values())
    assert runner.calls < sum(len(tokens) for tokens in heard.tokens.values())  # steps are shared
    assert_only_kept(engine, runner)


def test_late_arrivals_do_not_change_the_others() -> None:
    adds = assorted(20)
    engine, _ = make()
    heard = Heard()
    for one in adds:
        engine.receive(one)
        heard.take(engine.step())
        heard.take(engine.step())
    while engine.busy:
        heard.take(engine.step())
    assert {one.id: heard.answer(one.id) for one in adds} == alone(adds)


def test_preempted_sequences_say_the_same_as_undisturbed_ones() -> None:
    """A cache that is too small for all: some are thrown out and computed again."""
    adds = assorted(16, least=40)
    engine, runner = make(kv_tokens=300)
    heard = run(engine, adds)
    assert engine.scheduler.preemptions > 3
    assert {one.id: heard.answer(one.id) for one in adds} == alone(adds)
    assert_only_kept(engine, runner)


@pytest.mark.parametrize("budget", [1, 2, 3, 8])
def test_a_budget_of_a_token_or_two_changes_nothing_that_is_said(budget: int) -> None:
    """Prompts are read in chunks of one token then, which are no decoding steps."""
    adds = assorted(8)
    engine, runner = make(max_sequences=budget, token_budget=budget)
    heard = run(engine, adds)
    assert {one.id: heard.answer(one.id) for one in adds} == alone(adds)
    assert_only_kept(engine, runner)


def test_no_slot_at_random_changes_nothing_that_is_said() -> None:
    adds = assorted(16)
    random = np.random.default_rng(2)

    def no_slot(batch: Batch) -> bool:  # only where somebody can make room
        return len(set(batch.sequence_ids.tolist())) > 1 and bool(random.random() < 0.3)

    engine, runner = make(no_slot=no_slot)
    heard = run(engine, adds)
    assert engine.scheduler.preemptions > 3
    assert {one.id: heard.answer(one.id) for one in adds} == alone(adds)
    assert_only_kept(engine, runner)


def test_a_cache_with_fewer_cells_than_it_says_still_serves_all() -> None:
    """NoSlot comes again and again until enough sequences have made room."""
    adds = assorted(16)
    engine, runner = make(kv_tokens=1000, cells=220)
    heard = run(engine, adds)
    assert {one.id: heard.answer(one.id) for one in adds} == alone(adds)
    assert_only_kept(engine, runner)


def test_no_slot_for_a_sequence_that_is_alone_refuses_it() -> None:
    """There is nobody to make room: the engine must not try for ever."""
    engine, _ = make(no_slot=lambda batch: True)
    engine.receive(add())
    frame = engine.step()
    assert [refused.code for refused in frame.refused] == ["context_length_exceeded"]
    assert not engine.busy


def test_no_slot_in_the_middle_of_a_sequence_that_is_alone_ends_it_by_length() -> None:
    """What was made stays made, and the client hears why there is no more."""
    engine, _ = make(cells=60)
    heard = run(engine, [add("r", "go", max_tokens=60)])
    assert heard.ends["r"] == "length"
    assert 0 < len(heard.tokens["r"]) < 60


@pytest.mark.parametrize("draft", [0, 5])
def test_no_end_is_drawn_before_the_least_length(draft: int) -> None:
    """Up to where it would have ended a sequence says the same; also in company, with drafts, and
    if it is resumed."""
    least = {"r": 0, "s": 30, "t": 90}
    # Without truncation, which looks at all that may be drawn.
    kind: dict[str, Any] = {"logit_bias": {str(END): 2.0}, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    ended = []
    for seed in range(8):
        adds = [
            add(name, "go", 100, sampling=sampling(1.2, seed, min_tokens=count, **kind))
            for name, count in least.items()
        ]
        heard = run(make(can_end=True, draft=draft)[0], adds)
        short, tokens = heard.tokens["r"], heard.tokens["t"]
        assert END not in tokens[:90] and len(tokens) >= 90
        assert END not in heard.tokens["s"][:30] and len(heard.tokens["s"]) >= 30
        if END in short:
            assert tokens[: len(short) - 1] == short[:-1]
        (again,) = (one for one in adds if one.id == "t")
        again = msgspec.structs.replace(again, output=tokens[:50])
        assert run(make(can_end=True, draft=draft)[0], [again]).tokens["t"] == tokens[50:]
        ended.append(len(short) < 30 < len(heard.tokens["s"]) < 100)
    assert any(ended)  # one would have ended before, and has then


@pytest.mark.parametrize("stop", [[], ["e"], ["qqq"]])
def test_a_resumed_sequence_goes_on_with_new_text_only(stop: list[str]) -> None:
    """After any number of tokens that another leg has made: same tokens, no word twice."""
    whole = add("r", "go", max_tokens=30, stop=stop)
    engine, _ = make(can_end=True)
    engine.receive(whole)
    said: list[tuple[str, list[int]]] = []
    end = None
    while engine.busy:
        for output in engine.step().outputs.values():
            said.append((output.text, output.tokens))
            end = output.finish_reason or end
    tokens = [token for _, made in said for token in made]
    assert len(tokens) > 3
    for cut in range(len(said)):
        sent = "".join(text for text, _ in said[:cut])
        engine, runner = make(can_end=True)
        resumed = run(engine, [add("r", "go", 30, stop=stop, output=tokens[:cut])])
        assert resumed.tokens["r"] == tokens[cut:]
        assert sent + resumed.text["r"] == "".join(text for text, _ in said)
        assert resumed.ends["r"] == end
        assert_only_kept(engine, runner)


def test_a_long_prompt_does_not_hold_up_the_others() -> None:
    """Chunked prefill: while 150 tokens are read, a running stream gets one token a step."""
    engine, _ = make()
    engine.receive(add("short", "a", max_tokens=30))
    engine.step()
    engine.receive(add("long", "b" * 120, max_tokens=2))
    for _ in range(4):
        outputs = engine.step().outputs
        assert "short" in outputs
    assert "long" not in outputs  # it is still being read


def test_an_arrival_is_in_the_very_next_step() -> None:
    """Also if the steps before it went on without a plan."""
    engine, _ = make(token_budget=64)
    engine.receive(add("stream", max_tokens=100))
    for number in range(20):
        engine.step()
        engine.receive(add(f"late{number}", str(number), max_tokens=1))
        assert f"late{number}" in engine.step().outputs
        for _ in range(number % 3):
            engine.step()


# -- arrivals and ends -----------------------------------------------------------------------------


def test_cancel_frees_a_running_sequence_at_once() -> None:
    engine, runner = make()
    heard = Heard()
    engine.receive(add("gone", max_tokens=100))
    engine.receive(add("stays", max_tokens=5))
    for _ in range(3):
        heard.take(engine.step())
    before = len(heard.tokens["gone"])
    engine.receive(Cancel("gone"))
    assert engine.scheduler.kv_used == len(runner.cells[1])
    assert runner.used == engine.scheduler.prefixes.cells
    while engine.busy:
        heard.take(engine.step())
    assert heard.ends == {"gone": "cancelled", "stays": "length"}
    assert len(heard.tokens["gone"]) == before
    assert heard.answer("stays") == alone([add("stays", max_tokens=5)])["stays"]


@pytest.mark.parametrize("begun", [True, False])
def test_a_cancelled_prompt_tells_whether_it_was_begun(begun: bool) -> None:
    """What only waited costs nothing; what was computed in part does."""
    engine, _ = make(kv_tokens=1000, context=1000)
    engine.receive(add("r", "x" * (4 * BUDGET), max_tokens=5))
    heard = Heard()
    if begun:
        heard.take(engine.step())
    engine.receive(Cancel("r"))
    heard.take(engine.step())
    assert heard.ends == {"r": "cancelled"} and not heard.tokens["r"]
    assert len(heard.queue_ms.get("r", [])) == begun


def test_cancel_of_a_waiting_sequence_ends_it_without_a_token() -> None:
    engine, _ = make(max_sequences=1)
    heard = Heard()
    engine.receive(add("runs", max_tokens=5))
    engine.receive(add("waits"))
    heard.take(engine.step())
    engine.receive(Cancel("waits"))
    while engine.busy:
        heard.take(engine.step())
    assert heard.ends == {"waits": "cancelled", "runs": "length"}
    assert heard.tokens["waits"] == []


def test_cancel_right_after_add_is_reported_with_the_prompt() -> None:
    engine, runner = make()
    heard = run(engine, [add("r"), Cancel("r")])
    assert heard.ends == {"r": "cancelled"} and heard.prompts["r"]
    assert runner.calls == 0 and not engine.busy


def test_cancelling_an_ended_or_unknown_request_is_ignored() -> None:
    engine, runner = make()
    run(engine, [add("r")])
    calls = runner.calls
    engine.receive(Cancel("r"))
    engine.receive(Cancel("nobody"))
    assert engine.step().outputs == {}
    assert not engine.busy and runner.calls == calls


def test_the_frame_after_the_last_one_ended_shows_an_empty_engine() -> None:
    engine, _ = make()
    engine.receive(add(max_tokens=2))
    shown = []
    while engine.busy:
        shown.append(engine.step().load)
    assert shown[0].running == 1 and shown[0].kv_used > 0
    assert (shown[-1].running, shown[-1].waiting, shown[-1].kv_used) == (0, 0, 0)
    assert shown[-1].kv_cached > 0
    assert shown[-1].tokens_computed > shown[-1].steps > 0


def test_a_prompt_over_the_context_is_refused_with_its_numbers() -> None:
    engine, runner = make(context=100)
    prompt = len(engine_prompt("x" * 200))
    heard = run(engine, [add("big", "x" * 200), add("small", "x")])
    assert heard.refused["big"].code == "context_length_exceeded"
    for number in (str(prompt), "100", "n_prompt_tokens", "n_ctx"):
        assert number in heard.refused["big"].message
    assert "big" not in heard.prompts
    assert heard.ends == {"small": "length"} and runner.calls > 0


def test_a_prompt_must_leave_room_for_one_token() -> None:
    size = len(engine_prompt("abc"))
    heard = run(make(context=size)[0], [add("r", "abc")])
    assert "r" in heard.refused
    heard = run(make(context=size + 1)[0], [add("r", "abc", max_tokens=50)])
    assert heard.ends == {"r": "length"} and len(heard.tokens["r"]) == 1


@pytest.mark.parametrize(("asked", "made"), [(1, 1), (7, 7), (None, 50), (5000, 50)])
def test_length_ends_at_max_tokens_or_at_the_context(asked: int | None, made: int) -> None:
    size = len(engine_prompt("abc"))
    heard = run(make(context=size + 50)[0], [add("r", "abc", max_tokens=asked)])
    assert heard.ends == {"r": "length"} and len(heard.tokens["r"]) == made


def test_max_tokens_counts_the_tokens_of_an_earlier_leg() -> None:
    heard = run(make()[0], [add("r", max_tokens=10, output=[65] * 7)])
    assert len(heard.tokens["r"]) == 3 and heard.ends == {"r": "length"}


def test_an_end_token_is_counted_but_not_said() -> None:
    class Ends(FakeRunner):
        def decode(self, batch: Batch) -> npt.NDArray[np.float32]:
            logits = super().decode(batch)
            logits[:, END] = 50 if batch.positions[-1] >= len(prompt) + 2 else -50
            return logits

    prompt = engine_prompt("hello")
    heard = run(Engine(Ends(load()), token_budget=BUDGET), [add("r", max_tokens=50)])
    assert heard.ends == {"r": "stop"}
    assert heard.tokens["r"][-1] == END and len(heard.tokens["r"]) == 4
    assert len(heard.text["r"]) == 3


def test_a_stop_string_ends_with_stop_and_is_not_said() -> None:
    engine = Engine(FakeRunner(load(context=500)), token_budget=BUDGET)
    heard = run(engine, [add("r", max_tokens=200, stop=["jumps over", "lazy"])])
    assert heard.ends == {"r": "stop"}
    text = heard.text["r"]
    assert text.endswith(("fox ", "the ")) and "jumps over" not in text and "lazy" not in text


def test_text_held_back_for_a_stop_string_is_said_at_the_end() -> None:
    def ending(stop: list[str]) -> str:
        engine = Engine(FakeRunner(load()), token_budget=BUDGET)
        return run(engine, [add("r", max_tokens=11, stop=stop)]).text["r"]

    text = ending([])
    assert len(text) == 11
    assert ending([text[-3:] + "#"]) == text


def test_the_queue_time_is_said_once_with_the_first_token() -> None:
    heard = run(make(kv_tokens=230)[0], assorted(16))
    assert all(len(times) == 1 and times[0] >= 0 for times in heard.queue_ms.values())
    assert len(heard.queue_ms) == 16


def test_a_resumed_request_says_its_times_with_its_first_token() -> None:
    """Each leg has waited, and may have found its prompt in the cache."""
    engine, _ = make()
    prompt = run(engine, [add("first", max_tokens=5)]).prompts["first"]
    heard = run(engine, [add("r", max_tokens=10, output=[65] * 7)])
    assert len(heard.queue_ms.get("r", [])) == 1
    assert heard.cached.get("r") == [len(prompt)]


def test_the_fake_model_repeats_its_sentence_by_position() -> None:
    """What other tests rely on: the token at any position is known beforehand."""
    prompt = engine_prompt("hello")
    heard = run(Engine(FakeRunner(load()), token_budget=BUDGET), [add("r", max_tokens=60)])
    at = len(prompt) - 1
    expected = (SENTENCE * 9)[at : at + 60].decode()
    assert heard.text["r"] == expected
