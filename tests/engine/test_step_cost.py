"""The cost: prompts do not stop the streams, and drafts are made where they pay."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pinaivu_box.engine.step_cost import (
    MAX_GAP_STRETCH,
    MAX_STEP_SECONDS,
    MIN_PROMPT_TOKENS,
    MIN_STEP_SECONDS,
    StepCostModel,
)

TOLERANCE = 1.001


class Machine:
    """Steps take a fixed time, more for each row, and more for each prompt token."""

    def __init__(self, step: float, row: float, prompt_token: float) -> None:
        self.step, self.row, self.prompt_token = step, row, prompt_token

    def seconds(self, rows: int, prompt: int = 0) -> float:
        return self.step + rows * self.row + prompt * self.prompt_token

    def teach(self, rows: list[int], prompts: list[int]) -> StepCostModel:
        cost = StepCostModel()
        for _ in range(3):
            for count in rows:
                cost.observe(count, 0, self.seconds(count))
            for size in prompts:
                cost.observe(rows[0], size, self.seconds(rows[0], size))
        return cost


MACHINES = st.builds(Machine, st.floats(1e-4, 0.3), st.floats(1e-6, 0.05), st.floats(1e-6, 0.05))
MOST = st.integers(1, 4096)


@given(MACHINES, st.sampled_from([1, 2, 5, 9, 16, 30]), MOST)
def test_prompts_beside_streams_stretch_a_step_as_far_as_is_said(
    machine: Machine, rows: int, most: int
) -> None:
    """Sevenfold, or to what nobody minds; never to more than what anybody minds."""
    cost = machine.teach([1, 4, 16], [8, 64, 512])
    budget = cost.prompt_budget(rows, most)
    assert min(most, MIN_PROMPT_TOKENS) <= budget <= most
    alone = machine.seconds(rows)
    limit = min(MAX_STEP_SECONDS, max(MIN_STEP_SECONDS, MAX_GAP_STRETCH * alone))
    if budget > MIN_PROMPT_TOKENS:
        assert machine.seconds(rows, budget) <= TOLERANCE * limit


@given(MACHINES, MOST)
def test_prompts_alone_take_a_step_of_the_longest_time_at_most(machine: Machine, most: int) -> None:
    """So long waits who comes in the middle of it."""
    cost = machine.teach([1, 4, 16], [8, 64, 512])
    budget = cost.prompt_budget(0, most)
    assert min(most, MIN_PROMPT_TOKENS) <= budget <= most
    if budget > MIN_PROMPT_TOKENS:
        assert budget * machine.prompt_token <= TOLERANCE * MAX_STEP_SECONDS


@given(MACHINES, st.sampled_from([0, 1, 5, 16]))
def test_the_budget_is_used_where_there_is_time(machine: Machine, rows: int) -> None:
    """Nothing is held back without need: twice as much would not have been allowed."""
    cost = machine.teach([1, 4, 16], [512, 512, 512])
    budget = cost.prompt_budget(rows, 10**9)
    alone = machine.seconds(rows) if rows else 0.0
    limit = (
        MAX_STEP_SECONDS
        if not rows
        else min(MAX_STEP_SECONDS, max(MIN_STEP_SECONDS, MAX_GAP_STRETCH * alone))
    )
    # A step's own time is at most a tenth of one with 512 prompt tokens, or it counts for them.
    each = max(machine.prompt_token, machine.seconds(1, 512) / 512)
    assert 2 * (budget + 1) * each + alone > limit / TOLERANCE


def test_it_begins_carefully_and_learns() -> None:
    cost = StepCostModel()
    assert cost.prompt_budget(0, 4096) == 4096  # nobody is held up
    assert cost.prompt_budget(1, 4096) <= 256
    slow = Machine(0.05, 0.001, 0.01).teach([1, 4], [64])
    fast = Machine(0.05, 0.001, 0.0001).teach([1, 4], [64])
    assert MIN_PROMPT_TOKENS <= slow.prompt_budget(1, 4096) < fast.prompt_budget(1, 4096)


def test_it_follows_a_machine_that_becomes_slower() -> None:
    cost = Machine(0.01, 0.0, 0.001).teach([1], [64])
    before = cost.prompt_budget(1, 4096)
    slower = Machine(0.01, 0.0, 0.005)
    for _ in range(30):
        cost.observe(1, 64, slower.seconds(1, 64))
    assert cost.prompt_budget(1, 4096) < before / 3


def test_steps_of_a_number_of_rows_that_never_came_are_estimated() -> None:
    machine = Machine(0.02, 0.003, 0.001)
    cost = machine.teach([2, 4, 10], [])
    for rows in (1, 3, 7, 20):
        assert cost.seconds(rows) == pytest.approx(machine.seconds(rows))
    assert cost.seconds(0) == 0


@pytest.mark.parametrize("rows", [1, 2, 8, 32])
@pytest.mark.parametrize("acceptance", [0.1, 0.5, 0.99])
def test_no_draft_where_a_row_costs_as_much_as_a_step(rows: int, acceptance: float) -> None:
    """A drafted token would take the time of a token that is sure."""
    cost = Machine(0.0, 0.02, 0.02).teach([1, 2, 4, 8], [])
    assert cost.draft_length(rows, float(rows), acceptance, 8) == 0


def test_no_draft_before_anything_is_known() -> None:
    assert StepCostModel().draft_length(1, 1.0, 0.9, 8) == 0


def test_the_cheaper_a_row_the_longer_the_draft() -> None:
    lengths = [
        Machine(0.02, row, 0.001).teach([1, 2, 4, 8], []).draft_length(1, 1.0, 0.6, 16)
        for row in (0.02, 0.005, 0.001, 0.0001, 0.0)
    ]
    assert lengths == sorted(lengths)
    assert lengths[0] == 0 and lengths[2] >= 3 and lengths[-1] == 15


@given(
    MACHINES,
    st.integers(1, 16),
    st.floats(0.01, 0.99),
    st.floats(0.01, 0.99),
    st.integers(0, 16),
)
def test_a_better_chance_never_makes_a_draft_shorter(
    machine: Machine, rows: int, one: float, other: float, most: int
) -> None:
    cost = machine.teach([1, 2, 4, 8, 16], [])
    worse, better = sorted((one, other))
    shorter = cost.draft_length(rows, float(rows), worse, most)
    assert shorter <= cost.draft_length(rows, float(rows), better, most) <= most


@given(MACHINES, st.integers(1, 16), st.floats(0.01, 0.99))
def test_a_draft_gives_more_tokens_a_second(machine: Machine, rows: int, chance: float) -> None:
    """Clearly more than none, and no less than a shorter or a longer one."""
    cost = machine.teach([1, 2, 4, 8, 16, 32], [])
    count = cost.draft_length(rows, float(rows), chance, 16)

    def rate(drafted: int) -> float:
        expected = rows + sum(chance**n for n in range(1, drafted + 1))
        return expected / machine.seconds(rows + drafted)

    others = [rate(drafted) for drafted in (3, 7, 15)]
    if count:
        assert rate(count) >= max(others) / TOLERANCE
        assert rate(count) >= 1.04 * rate(0)
    else:
        assert max(others) <= 1.06 * rate(0)


def test_an_untried_draft_length_is_tried_if_it_may_pay() -> None:
    """Two rows may cost twice as much as one (llama.cpp's kernels), and eight hardly more."""
    cost = StepCostModel()
    cost.observe(1, 0, 0.010)
    cost.observe(1, 400, 0.010 + 400 * 0.0014)
    cost.observe(2, 0, 0.020)
    count = cost.draft_length(1, 1.0, 0.95, 63)
    assert count >= 7
    cost.observe(1 + count, 0, 1.0)  # it is not good
    assert cost.draft_length(1, 1.0, 0.95, 63) < count


def test_an_accident_is_forgotten() -> None:
    cost = Machine(0.01, 0.0005, 0.0005).teach([1], [64])
    count = cost.draft_length(1, 1.0, 0.9, 15)
    cost.observe(4, 0, 1.0)
    cost.observe(8, 0, 1.0)
    cost.observe(16, 0, 1.0)
    assert count > 0 and cost.draft_length(1, 1.0, 0.9, 15) == 0
    for _ in range(1100):
        cost.observe(1, 0, 0.0105)
    assert cost.draft_length(1, 1.0, 0.9, 15) == count
