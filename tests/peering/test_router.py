"""Routing: who may serve, who scores better, and what the decision says about it."""

from __future__ import annotations

import json
from dataclasses import replace
from random import Random

import msgspec
import pytest
import rfc8785
from hypothesis import given, settings
from hypothesis import strategies as st

from pinaivu_box.gossip.adverts import ModelLoad
from pinaivu_box.routing.circuit_breaker import LONGEST_SECONDS, CircuitBreaker
from pinaivu_box.routing.router import (
    DRAWN,
    Candidate,
    RoutingRequest,
    route,
    scores,
    why_not,
)

TOKENS = 500
ASK = RoutingRequest("m:1", "d1", TOKENS, "credits")
PEER = Candidate(
    node_id="node_a", model="m:1", digest="d1", sequences=4, load=ModelLoad(2, 9000, 0),
    ttft_ms=100.0, tokens_per_s=50.0, cost=1000, currency="credits", rtt_ms=10.0,
)  # fmt: skip
HOME = replace(PEER, node_id="node_home", local=True, rtt_ms=0.0)


def loaded(candidate: Candidate, **load: int) -> Candidate:
    return replace(candidate, load=msgspec.structs.replace(candidate.load, **load))


BUSY_HOME = loaded(HOME, sequences_free=0, queue=3)

# Fields with the direction in which they are better.
BETTER = {
    "sequences_free": 1, "kv_free": 1, "queue": -1, "ttft_ms": -1, "tokens_per_s": 1, "cost": -1,
    "reputation": 1, "rtt_ms": -1, "sent": -1,
}  # fmt: skip

candidates = st.lists(
    st.builds(
        Candidate,
        node_id=st.integers(0, 10**6).map("node_{:07}".format),
        model=st.sampled_from(["m:1", "m:1", "m:1", "x:1"]),
        digest=st.sampled_from(["d1", "d1", "d1", "d2"]),
        sequences=st.integers(1, 64),
        load=st.builds(ModelLoad, st.integers(0, 8), st.integers(0, 2000), st.integers(0, 20)),
        ttft_ms=st.floats(0, 10_000),
        tokens_per_s=st.floats(0, 500),
        cost=st.integers(0, 10**12),
        currency=st.sampled_from(["credits", "credits", "credits", "EUR"]),
        reputation=st.floats(0, 1),
        rtt_ms=st.none() | st.floats(0, 500),
        sent=st.integers(0, 8),
        local=st.booleans(),
        known=st.booleans(),
        warm=st.booleans(),
        draining=st.booleans(),
        gone=st.booleans(),
        tripped=st.none() | st.just("failed lately"),
        refuses=st.none() | st.none() | st.just("is full of sand"),
    ),
    max_size=12,
    unique_by=lambda one: one.node_id,
)
asks = st.builds(
    RoutingRequest,
    model=st.just("m:1"),
    digest=st.sampled_from(["d1", None]),
    tokens=st.integers(1, 3000),
    currency=st.just("credits"),
    policy=st.sampled_from(["never", "prefer-local", "balance", "cheapest"]),
    same_name=st.booleans(),
    local_only=st.booleans(),
)


@settings(max_examples=100)
@given(candidates, asks, st.integers())
def test_it_selects_an_eligible_candidate_and_says_why_others_are_not(
    given_: list[Candidate], ask: RoutingRequest, seed: int
) -> None:
    decision = route(given_, ask, Random(seed))
    by_id = {one.node_id: one for one in given_}
    assert {one.node_id for one in decision.candidates} == set(by_id)
    for one in decision.candidates:
        assert one.why_not == why_not(by_id[one.node_id], ask)
        assert 0.0 <= one.score <= 1.0 + 1e-9
    may = [one for one in given_ if why_not(one, ask) is None]
    assert (decision.node_id is None) == (not may)
    assert decision.node_id is None or decision.node_id in {one.node_id for one in may}
    if ask.local_only or ask.policy == "never":
        assert decision.node_id is None or by_id[decision.node_id].local


@settings(max_examples=100)
@given(candidates, asks, st.integers(), st.randoms())
def test_the_same_source_of_chance_gives_the_same_decision(
    given_: list[Candidate], ask: RoutingRequest, seed: int, shuffler: Random
) -> None:
    first = route(given_, ask, Random(seed))
    shuffler.shuffle(given_)
    assert route(given_, ask, Random(seed)) == first


@settings(max_examples=100)
@given(candidates, asks, st.sampled_from(sorted(BETTER)), st.integers(1, 500), st.data())
def test_an_improved_candidate_never_ranks_lower(
    given_: list[Candidate], ask: RoutingRequest, field: str, by: int, data: st.DataObject
) -> None:
    may = [one for one in given_ if why_not(one, ask) is None]
    if not may:
        return
    at = data.draw(st.integers(0, len(may) - 1))
    of_load = field in ModelLoad.__struct_fields__
    value = getattr(may[at].load if of_load else may[at], field)
    if value is None:
        return
    most = 1.0 if field == "reputation" else float("inf")
    improved = min(most, max(0, value + BETTER[field] * by))
    before = [one.score for one in scores(may, ask)]
    change = loaded if of_load else replace
    may[at] = change(may[at], **{field: improved})
    after = [one.score for one in scores(may, ask)]
    assert after[at] >= before[at] - 1e-12
    for other in range(len(may)):
        assert after[at] - after[other] >= before[at] - before[other] - 1e-12


def test_the_score_is_what_its_docstring_says() -> None:
    dear = replace(PEER, node_id="node_b", cost=4000, ttft_ms=10.0, rtt_ms=0.0, reputation=0.5)
    first, second = scores([PEER, dear], ASK)
    assert first.score == pytest.approx(0.4 + 0.3 * 110 / 210 + 0.3)
    assert second.score == pytest.approx(0.4 / 4 + 0.3 + 0.3 * 0.5)
    waits = loaded(PEER, sequences_free=0, queue=3)  # 4 ahead, 4 places, 256 tokens at 50/s
    assert waits.expected_ms(TOKENS) == pytest.approx(110 + 4 * 5120 / 4)


def test_local_first_when_local_can_start_at_once() -> None:
    better = replace(PEER, cost=0, ttft_ms=1.0)
    assert route([HOME, better], ASK, Random(1)).reason == "local"
    assert route([BUSY_HOME, better], ASK, Random(1)).node_id == "node_a"
    assert route([HOME, better], replace(ASK, policy="balance"), Random(1)).node_id == "node_a"
    full = loaded(HOME, kv_free=TOKENS - 1)
    assert route([full, better], ASK, Random(1)).node_id == "node_a"
    for stay in ({"policy": "never"}, {"local_only": True}):
        assert route([BUSY_HOME, better], replace(ASK, **stay), Random(1)).node_id == "node_home"


def test_a_model_is_its_file_unless_the_name_is_enough() -> None:
    other = replace(PEER, digest="d2")
    assert (
        route([other], ASK, Random(1)).candidates[0].why_not == "has another file under that name"
    )
    assert route([other], replace(ASK, same_name=True), Random(1)).node_id == "node_a"


def test_cheapest_is_the_cheapest_and_the_better_of_equals() -> None:
    cheap = replace(PEER, node_id="node_c", cost=10, ttft_ms=5000.0, reputation=0.1)
    ask = replace(ASK, policy="cheapest")
    assert route([HOME, PEER, cheap], ask, Random(1)).node_id == "node_c"
    faster = replace(cheap, node_id="node_d", ttft_ms=50.0)
    assert route([HOME, cheap, faster], ask, Random(1)).node_id == "node_d"


def test_a_conversation_stays_where_its_cache_is_warm_while_that_can_start() -> None:
    crowd = [replace(PEER, node_id=f"node_{n}") for n in range(20)]
    crowd[7] = replace(crowd[7], warm=True, ttft_ms=150.0)
    assert {route([BUSY_HOME, *crowd], ASK, Random(n)).node_id for n in range(20)} == {"node_7"}
    crowd[7] = loaded(crowd[7], sequences_free=0)
    assert "node_7" not in {route(crowd, ASK, Random(n)).node_id for n in range(50)}


def test_an_exact_answer_goes_on_at_a_box_of_the_same_variant_that_can_start() -> None:
    crowd = [replace(PEER, node_id=f"node_{n}", cpu_variant="zen4") for n in range(30)]
    crowd[7] = replace(crowd[7], cpu_variant="haswell", ttft_ms=900.0, cost=4000)
    home = replace(HOME, cpu_variant="zen4")
    ask = replace(ASK, exactness="bitwise:haswell llama.cpp 1 f16")
    assert {route([home, *crowd], ask, Random(n)).node_id for n in range(20)} == {"node_7"}
    for other in (ASK, replace(ASK, exactness="bitwise:haswellx llama.cpp 1 f16")):
        assert route([home, *crowd], other, Random(1)).node_id == "node_home"
    for worse in (loaded(crowd[7], sequences_free=0), replace(crowd[7], gone=True)):
        crowd[7] = worse
        assert route([home, *crowd], ask, Random(1)).node_id == "node_home"


def test_many_routers_with_one_view_do_not_all_take_the_same_box() -> None:
    crowd = [replace(PEER, node_id=f"node_{n:02}", ttft_ms=100.0 + n) for n in range(20)]
    taken = [route(crowd, ASK, Random(seed)).node_id for seed in range(400)]
    assert len(set(taken)) > 10
    assert max(taken.count(one) for one in set(taken)) < 400 / 4
    poor = replace(PEER, node_id="node_poor", ttft_ms=20_000.0, reputation=0.0)
    assert "node_poor" not in {route([*crowd, poor], ASK, Random(n)).node_id for n in range(200)}


def test_of_two_that_are_about_as_good_the_idler_is_taken() -> None:
    idle = loaded(replace(PEER, node_id="node_z", cost=1100), sequences_free=4)
    assert {route([PEER, idle], ASK, Random(n)).node_id for n in range(20)} == {"node_z"}
    sent = replace(idle, sent=3)  # what we sent since it said so counts
    assert {route([PEER, sent], ASK, Random(n)).node_id for n in range(20)} == {"node_a"}


def test_of_many_a_few_are_drawn_and_the_cheapest_is_looked_for_among_all() -> None:
    crowd = [replace(PEER, node_id=f"node_{n:03}") for n in range(200)]
    crowd[150] = replace(crowd[150], cost=900)
    decision = route([BUSY_HOME, *crowd], ASK, Random(1))
    assert decision.eligible == DRAWN + 1
    assert decision.record()["left_out"]["was not drawn"] == 200 - DRAWN
    assert route(crowd, replace(ASK, policy="cheapest"), Random(1)).node_id == "node_150"


def test_known_candidates_are_compared_and_one_of_the_best_is_chosen() -> None:
    crowd = [
        replace(PEER, node_id=f"node_{n:03}", known=True, cost=1000 + n // 4 * 50)
        for n in range(200)
    ]
    crowd += [replace(PEER, node_id=f"node_x{n}") for n in range(100)]
    decision = route([BUSY_HOME, *crowd], ASK, Random(1))
    assert decision.eligible == 200 + DRAWN + 1
    taken = {route(crowd[:200], ASK, Random(n)).node_id for n in range(100)}
    assert len(taken) > 1 and taken < {f"node_00{n}" for n in range(4)}  # as good as each other


def test_loads_are_asked_for_if_only_an_offer_is_known() -> None:
    def ask_around(*given: Candidate, ask: RoutingRequest = ASK) -> bool:
        return route(given, ask, Random(1)).unsure

    known, home = replace(PEER, known=True), replace(BUSY_HOME, known=True)
    assert ask_around(home, PEER) and ask_around(PEER, replace(known, node_id="node_b"))
    assert not ask_around(replace(HOME, known=True), PEER)  # it stays here
    assert not ask_around(home, known) and not ask_around(home)
    assert not ask_around(home, known, replace(PEER, node_id="node_b", draining=True))
    assert not ask_around(home, PEER, ask=replace(ASK, local_only=True))
    assert not ask_around(home, replace(PEER, warm=True))  # and its cache decides


def test_a_box_that_is_reported_gone_is_asked_last() -> None:
    gone = replace(PEER, node_id="node_gone", gone=True, cost=0)
    assert route([PEER, gone], ASK, Random(1)).node_id == "node_a"
    assert route([gone], ASK, Random(1)).node_id == "node_gone"
    assert route([PEER, gone], replace(ASK, tried=["node_a"]), Random(1)).node_id == "node_gone"


def test_the_decision_fits_a_receipt_and_a_header() -> None:
    crowd = [replace(PEER, node_id=f"node_{n:064x}") for n in range(1000)]
    crowd[0] = replace(crowd[0], draining=True)
    crowd[999] = replace(crowd[999], warm=True, cost=1100)
    decision = route(crowd, ASK, Random(1))
    record = decision.record()
    assert len(rfc8785.dumps(record)) < 2000
    assert json.loads(json.dumps(record)) == record
    assert record["chosen"] in [one["node_id"] for one in record["candidates"]]
    assert len(record["candidates"]) + sum(record["left_out"].values()) == 1000
    assert record["left_out"]["is draining"] == 1 and record["eligible"] == 17
    assert len(decision.header()) <= 200 and decision.header().isascii()
    assert "reason=warm" in decision.header()


def test_a_decision_for_nobody_tells_the_reasons() -> None:
    crowd = [replace(PEER, node_id=f"node_{n}", draining=True) for n in range(3)]
    decision = route([*crowd, replace(PEER, tripped="has failed lately")], ASK, Random(1))
    assert decision.node_id is None and decision.header().startswith("none; reason=nobody")
    assert decision.why_nobody().endswith("3 is draining; 1 has failed lately")
    assert route([], ASK, Random(1)).why_nobody() == "no box offers it"


def test_all_weights_zero_is_no_crash() -> None:
    assert route([PEER], replace(ASK, weights=(0, 0, 0)), Random(1)).node_id == "node_a"


def test_each_failure_doubles_the_backoff_and_one_request_probes() -> None:
    now = [0.0]
    breaker = CircuitBreaker(lambda: now[0], Random(1))
    rests = [breaker.failed("node_a") for _ in range(40)]
    assert 0.5 <= rests[0] <= 1.5 and 2 <= rests[2] <= 6
    assert max(rests) <= 1.5 * LONGEST_SECONDS and rests[39] >= 0.5 * LONGEST_SECONDS
    assert breaker.why("node_a") == "failed 40 times in a row and is left alone"
    assert breaker.why("node_b") is None
    now[0] = 1000.0
    assert breaker.why("node_a") is None
    breaker.sent("node_a")
    assert "one request" in str(breaker.why("node_a"))
    breaker.served("node_a")
    assert breaker.why("node_a") is None
    assert breaker.failed("node_a") <= 1.5


def test_requests_that_fail_with_a_box_count_as_one_failure() -> None:
    now = [0.0]
    breaker = CircuitBreaker(lambda: now[0], Random(1))
    sent = [breaker.sent("node_a") for _ in range(8)]
    now[0] = 5.0
    for at in sent:
        assert breaker.failed("node_a", at) <= 1.5
    now[0] = 7.0  # rested; the probe fails as well
    assert 1 <= breaker.failed("node_a", breaker.sent("node_a")) <= 3
