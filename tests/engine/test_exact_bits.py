"""The same bits of llama.cpp, alone and beside others, whatever became of the request meanwhile.

As ggml's makers have published it, attention takes another way for a row that is alone, from 512
cells on (of which llama.cpp counts 256 more than there are), and for 64 rows.  The prompt is longer
than 256 cells, so that this would be seen.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pinaivu_box.engine import exactness
from pinaivu_box.engine.llama_devices import cpu_library, load_backends
from pinaivu_box.engine.llama_runner import LlamaRunner
from pinaivu_box.engine.messages import Add, SavedPrefixes
from pinaivu_box.engine.prefix_store import PrefixStore
from pinaivu_box.errors import BoxError
from tests.support.engine_harness import Engine, Fixed, Heard, add, finish, run, sampling
from tests.support.llama32 import REAL
from tests.support.random_weights import quantised
from tests.support.real_answers import clear
from tests.support.real_runner import real_runner

PROMPT = [100 + 7919 * n % 3900 for n in range(270)]
COUNT = 8
STREAMS, POOL = 16 * 512, 1536  # cells: for each of 16 sequences, and for all together
SIZES: dict[str, Any] = {"context": 512, "max_sequences": 16, "exact": "auto"}
Q4_K_M, Q2_K, F16, BF16 = 15, 10, 1, 32  # LLAMA_FTYPE_...


def one(name: str = "r", prompt: list[int] = PROMPT, **more: Any) -> Add:
    given = {"sampling": sampling(0.9, seed=3, ignore_eos=True), "logprobs": 3, **more}
    return add(name, "", given.pop("max_tokens", COUNT), prompt=prompt, **given)


def said(heard: Heard, name: str = "r") -> tuple[list[int], Any]:
    return heard.tokens[name], heard.logprobs[name]


def engine(llama: LlamaRunner, budget: int = 256, **more: Any) -> Engine:
    clear(llama)
    return Engine(llama, token_budget=budget, **more)


@pytest.fixture(scope="module", params=["bundled", "k-quants"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path | None:
    """None: the bundled one.  All matrices of the other are K-quants, which those of the bundled
    one's shape cannot be; its weights are random."""
    if request.param == "bundled":
        return None
    folder = tmp_path_factory.mktemp("k-quants")
    plain = folder / "q8_0.gguf"
    plain.write_bytes(REAL["1b"].narrow().weights())
    load_backends()
    return quantised(plain, folder / "q4_k_m.gguf", Q4_K_M)


@pytest.fixture(scope="module", params=[STREAMS, POOL])
def llama(request: pytest.FixtureRequest, model: Path | None) -> Iterator[LlamaRunner]:
    runner = real_runner(model, **SIZES, kv_tokens=request.param)
    if cpu_library().fixed_split < exactness.ROWS_ALIKE:
        assert not runner.facts.exactness
        runner.close()
        pytest.skip("this llama.cpp is not the one that build/ makes: nothing is promised of it")
    assert runner.facts.exactness
    yield runner
    runner.close()


@pytest.fixture(scope="module")
def expected(llama: LlamaRunner) -> tuple[list[int], Any]:
    """What is said alone, with nothing cached."""
    return said(run(engine(llama), [one()]))


def test_beside_fifteen_others(llama: LlamaRunner, expected: object) -> None:
    """They come before and after it, and their prompts are computed beside its answer."""
    made = engine(llama, budget=128)
    others = [
        add(f"o{n}", f"Tell me {n} words.", 4 + 3 * n % 20, sampling=sampling(0.9, seed=n))
        for n in range(15)
    ]
    heard = run(made, [*others[:9], one()])
    for other in others[9:]:
        made.receive(other)
    finish(made, heard)
    assert said(heard) == expected


def test_in_a_cache_that_others_have_filled(llama: LlamaRunner, expected: object) -> None:
    """Their cells lie between its own, and those that they leave are taken in another order."""
    made, heard = engine(llama), Heard()
    others = [
        add(f"o{n}", "", 9 + n, prompt=[2000 + 31 * n + k for k in range(70 + 5 * n)])
        for n in range(14)
    ]
    for other in others[:12]:
        made.receive(other)
        heard.take(made.step())
    for request in (others[12], one(), others[13]):
        made.receive(request)
    finish(made, heard)
    again = run(made, [one("again", scope="another")])
    assert said(heard) == said(again, "again") == expected


def test_with_a_prompt_that_is_cut_otherwise(llama: LlamaRunner, expected: object) -> None:
    assert said(run(engine(llama, budget=64), [one()])) == expected


def test_preempted_and_with_what_others_have_left(llama: LlamaRunner, expected: object) -> None:
    made = engine(llama)
    made.receive(add("old", "Go on.", 60, sampling=sampling(0.9, seed=1, ignore_eos=True)))
    made.receive(one())
    heard = Heard()
    while len(heard.tokens.get("r", [])) < COUNT // 2:
        heard.take(made.step())
    assert made.scheduler.reclaim() and made.scheduler.preemptions == 1
    finish(made, heard)
    assert said(heard) == expected
    longer = run(made, [one("longer", [*PROMPT, *heard.tokens["r"], *range(90, 160)])])
    assert longer.cached["longer"] == [len(PROMPT) + COUNT - 1]  # the last was not computed
    warm = run(made, [one("warm")])
    assert warm.cached["warm"] == [len(PROMPT) - 1]
    assert said(warm, "warm") == expected


def test_drafted_and_by_another_leg(llama: LlamaRunner, expected: tuple[list[int], Any]) -> None:
    tokens, logprobs = expected
    prediction = b"".join(map(llama.spelling, tokens)).decode(errors="ignore")
    made = engine(llama, policy=Fixed(draft=7))
    heard = run(made, [one(prediction=prediction)])
    assert said(heard) == expected
    leg = run(made, [one("leg", output=tokens[:5])])
    assert said(leg, "leg") == (tokens[5:], logprobs[5:])


def test_after_a_restart_and_with_more_threads(
    llama: LlamaRunner, model: Path | None, expected: object, tmp_path: Path
) -> None:
    def store() -> PrefixStore:
        return PrefixStore(SavedPrefixes(str(tmp_path), bytes(32), 10**9), "here")

    before = engine(llama, store=store())
    run(before, [one(max_tokens=1)])
    assert before.save_prefixes().prefixes == 1
    clear(llama)
    another = real_runner(model, **SIZES, kv_tokens=llama.facts.kv_tokens, threads=2)
    try:
        heard = run(engine(another, store=store()), [one()])
        assert heard.load.tokens_restored >= 256
        assert said(heard) == expected
    finally:
        another.close()


def of_type(type_of_weights: int, folder: Path) -> LlamaRunner:
    plain = folder / "q8_0.gguf"
    plain.write_bytes(REAL["1b"].narrow().weights())
    load_backends()
    file = quantised(plain, folder / "quantised.gguf", type_of_weights)
    return real_runner(file, **SIZES, kv_tokens=STREAMS)


def alone_and_beside(llama: LlamaRunner, others: int) -> tuple[object, object]:
    alone = said(run(engine(llama), [one()]))
    requests = [one(), *(one(f"o{n}", PROMPT[n:]) for n in range(1, others + 1))]
    return alone, said(run(engine(llama), requests))


@pytest.mark.parametrize("type_of_weights", [F16, BF16])
def test_weights_of_16_bits(type_of_weights: int, tmp_path: Path) -> None:
    llama = of_type(type_of_weights, tmp_path)
    try:
        if not llama.facts.exactness:
            pytest.skip(
                "this llama.cpp is not the one that build/ makes: nothing is promised of it"
            )
        alone, beside = alone_and_beside(llama, 3)
        assert alone == beside
    finally:
        llama.close()


def test_it_would_be_seen_if_a_row_took_another_way(tmp_path: Path) -> None:
    """Q2_K is added up otherwise in more rows: nothing is promised there."""
    other = of_type(Q2_K, tmp_path)
    try:
        assert not other.facts.exactness
        alone, beside = alone_and_beside(other, 15)
        assert alone != beside
    finally:
        other.close()


def test_a_model_for_which_it_does_not_hold_is_not_loaded_if_it_has_to(tmp_path: Path) -> None:
    with pytest.raises(BoxError, match=r"exact = true cannot be kept: .*cache of type q4_0"):
        real_runner(None, **{**SIZES, "exact": True}, kv_tokens=STREAMS, kv_type="q4_0")
