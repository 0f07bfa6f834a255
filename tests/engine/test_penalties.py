"""Penalties and biases: OpenAI's formula, and nothing else.

OpenAI's reference: mu[j] -> mu[j] - c[j] * frequency_penalty - (c[j] > 0) * presence_penalty, with
c[j] the number of times that token j is in the output so far; a bias is added to its token's logit.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pinaivu_box.engine.fake_runner import END, N_VOCAB
from pinaivu_box.engine.messages import Sampling
from pinaivu_box.engine.sampling import Draw, PenaltyWindow, draw_rows
from tests.support.draws import draw
from tests.support.engine_harness import add, alone, make, run, sampling

Float32 = npt.NDArray[np.float32]
SIZE = 30
# Eighths and sixteenths are exact in single precision: no draw hangs on the order of rounding.
SIXTEENTHS = st.integers(-100, 100).map(lambda n: n / 16)
EIGHTHS = st.integers(-16, 16).map(lambda n: n / 8)
LOGITS = st.lists(SIXTEENTHS, min_size=SIZE, max_size=SIZE).map(lambda v: np.array(v, np.float32))
TOKENS = st.integers(0, SIZE - 1)
OUTPUTS = st.lists(TOKENS, max_size=40)
BIASES = st.dictionaries(TOKENS.map(str), st.sampled_from([-100, -3, -0.5, 0.25, 4, 100]))


def formula(logits: Float32, kind: Sampling, output: list[int]) -> Float32:
    adjusted = logits.astype(np.float64)
    counts = np.bincount(np.array(output, np.intp), minlength=len(logits))
    adjusted -= counts * kind.frequency_penalty + (counts > 0) * kind.presence_penalty
    for token, bias in kind.logit_bias.items():
        adjusted[int(token)] += bias
    return adjusted.astype(np.float32)


@settings(max_examples=300)
@given(LOGITS, OUTPUTS, EIGHTHS, EIGHTHS, BIASES, st.sampled_from([0, 0.7, 1.5]), st.data())
def test_draws_are_those_of_the_formula(
    logits: Float32,
    output: list[int],
    frequency: float,
    presence: float,
    bias: dict[str, float],
    temperature: float,
    data: st.DataObject,
) -> None:
    """Also in company, which stays as it is."""
    cuts: dict[str, Any] = data.draw(
        st.sampled_from([{"top_k": 0}, {"top_k": 4}, {"top_p": 0.5}, {"min_p": 0.2, "top_k": 0}])
    )
    plain = sampling(temperature, **cuts)
    kind = sampling(
        temperature,
        frequency_penalty=frequency,
        presence_penalty=presence,
        logit_bias=bias,
        **cuts,
    )
    positions = range(5)
    expected = [draw(formula(logits, kind, output), plain, position) for position in positions]
    beside = [draw(logits, plain, position) for position in positions]
    draws = [Draw(kind, position, PenaltyWindow(output)) for position in positions]
    draws += [Draw(plain, position) for position in positions]
    assert draw_rows(np.tile(logits, (10, 1)), draws) == expected + beside


def test_a_penalty_is_for_the_output_alone() -> None:
    """Not for the tokens of the prompt, which are all in it."""
    heavy = sampling(0, frequency_penalty=2.0, presence_penalty=2.0)
    text = "".join(map(chr, range(32, 127)))
    heavily, plainly = (
        run(make()[0], [add("r", text, 1, sampling=kind)]).tokens["r"]
        for kind in (heavy, sampling(0))
    )
    assert heavily == plainly


def by_hand(kind: Sampling, text: str, count: int) -> list[int]:
    """What an engine should say, one token after another."""
    _, runner = make()
    prompt = run(make()[0], [add("r", text, 1)]).prompts["r"]
    output: list[int] = []
    plain = sampling(kind.temperature, kind.seed)
    for _ in range(count):
        logits = formula(runner.logits(prompt + output), kind, output)
        if kind.ignore_eos:
            logits[END] = -np.inf
        output.append(draw(logits, plain, len(prompt) + len(output)))
    return output


KINDS: dict[str, dict[str, Any]] = {
    "frequency": {"frequency_penalty": 1.5},
    "presence": {"presence_penalty": -1.0},
    "both": {"frequency_penalty": 0.5, "presence_penalty": 0.75},
    "bias": {"logit_bias": {"65": 2.0, "66": -2.0}},
    "all": {"frequency_penalty": 0.5, "logit_bias": {"65": 5.0}, "ignore_eos": True},
    "none": {},
}


def test_an_engine_draws_by_the_formula() -> None:
    """All kinds side by side: most steps are taken without a plan, and the kinds do not mix."""
    kinds = {name: sampling(0.9, seed=n, **more) for n, (name, more) in enumerate(KINDS.items())}
    adds = [add(name, f"tell {name}", 40, sampling=kind) for name, kind in kinds.items()]
    heard = run(make()[0], adds)
    for one in adds:
        assert heard.tokens[one.id] == by_hand(one.sampling, f"tell {one.id}", 40)
    assert {one.id: heard.answer(one.id) for one in adds} == alone(adds)


@pytest.mark.parametrize("name", ["frequency", "both"])
def test_penalties_count_the_output_of_an_earlier_leg(name: str) -> None:
    kind = sampling(0.9, seed=3, **KINDS[name])
    tokens = by_hand(kind, "go", 30)
    for cut in (1, 7, 29):
        resumed = add("r", "go", 30, sampling=kind, output=tokens[:cut])
        assert run(make()[0], [resumed]).tokens["r"] == tokens[cut:]


@pytest.mark.parametrize("temperature", [0, 0.8, 2.0])
@pytest.mark.parametrize("top_k", [0, 40])
def test_a_bias_of_100_forces_and_of_minus_100_bans(temperature: float, top_k: int) -> None:
    """Whatever the token, as OpenAI's reference says."""
    for token in (ord("a"), ord("~"), 200):
        forced = sampling(temperature, top_k=top_k, logit_bias={str(token): 100.0})
        assert run(make()[0], [add("r", sampling=forced)]).tokens["r"] == [token] * 12
    usual = set(run(make()[0], [add("r", "x", 60, sampling=sampling(temperature))]).tokens["r"])
    banned = {str(token): -100.0 for token in usual}
    kind = sampling(temperature, top_k=top_k, logit_bias=banned)
    said = run(make()[0], [add("r", "x", 60, sampling=kind)]).tokens["r"]
    assert len(said) == 60 and not usual & set(said)


def test_a_bias_can_end_an_answer_but_not_against_ignore_eos() -> None:
    bias = {str(END): 100.0}
    ended = run(make()[0], [add("r", sampling=sampling(logit_bias=bias))])
    assert ended.answer("r") == ("", [END], "stop")
    endless = run(make()[0], [add("r", sampling=sampling(logit_bias=bias, ignore_eos=True))])
    assert END not in endless.tokens["r"] and endless.ends["r"] == "length"


def test_a_bias_for_a_token_that_there_is_not_is_refused() -> None:
    """And says so; the others are served."""
    wrong = add("wrong", sampling=sampling(logit_bias={str(N_VOCAB): 1.0}))
    last = add("last", sampling=sampling(logit_bias={str(N_VOCAB - 1): 100.0}))
    heard = run(make()[0], [wrong, last])
    assert str(N_VOCAB) in heard.refused["wrong"].message
    assert heard.ends == {"last": "stop"}
