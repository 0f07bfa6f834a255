"""Threads are chosen from what steps take: a machine is simulated, and the pace told its steps."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pinaivu_box.engine.pace import Mode, Pace

Seconds = Callable[[Mode], float]


def quiet(mode: Mode) -> float:
    """Of a step on a quiet machine with 4 cores."""
    return 0.08 / mode.threads * (1.0 if mode.patient else 1.4)


def busy(mode: Mode) -> float:
    """Beside a program on each core: who spins waits for whoever has no processor."""
    return 0.16 / mode.threads * (10.0 if mode.patient and mode.threads > 1 else 1.4)


def crowded(mode: Mode) -> float:
    """Beside so many others that threads hardly ever run at the same time."""
    return 0.2 * mode.threads


class Machine:
    """Runs a pace's steps on a machine where each takes `seconds` and threads wait for `share` of
    the time."""

    def __init__(self, threads: int = 4, *, adjustable: bool = True) -> None:
        self.waited = self.clock = 0.0
        self.pace = Pace(threads, lambda: self.waited, adjustable=adjustable)
        self.changes: list[bool] = []

    def run(self, seconds: Seconds, share: float, lasting: float = 60.0, tokens: int = 1) -> None:
        until = self.clock + lasting
        while self.clock < until:
            took = seconds(self.pace.mode)
            self.clock += took
            self.waited += share * took * self.pace.mode.threads
            if self.pace.observe(tokens, took):
                self.changes.append(self.pace.busy)


def test_a_quiet_machine_computes_with_all_cores_and_tries_nothing() -> None:
    machine = Machine()
    seen = set()

    def note(mode: Mode) -> float:
        seen.add(mode)
        return quiet(mode)

    machine.run(note, share=0.01)
    assert seen == {Mode(4, patient=True)}
    assert not machine.changes


@pytest.mark.parametrize(
    ("neighbours", "best"), [(busy, Mode(4, False)), (crowded, Mode(1, False))]
)
def test_beside_other_programs_it_computes_as_is_fastest_there(
    neighbours: Seconds, best: Mode
) -> None:
    machine = Machine()
    machine.run(neighbours, share=0.5)
    assert machine.pace.busy
    assert machine.changes == [True]
    modes: list[Mode] = []

    def note(mode: Mode) -> float:
        modes.append(mode)
        return neighbours(mode)

    machine.run(note, share=0.5, lasting=600)
    # It goes on trying, for little of the time.
    assert sum(map(neighbours, (mode for mode in modes if mode != best))) < 0.1 * 600


def test_it_goes_back_when_the_machine_is_quiet_again() -> None:
    machine = Machine()
    machine.run(busy, share=0.5)
    machine.run(quiet, share=0.0, lasting=90)
    assert machine.pace.mode == Mode(4, patient=True)
    assert machine.changes == [True, False]


def test_waiting_that_nothing_helps_against_changes_nothing() -> None:
    """Say, where others use a GPU's time."""
    machine = Machine()
    machine.run(lambda mode: 0.05, share=0.3)
    assert machine.pace.mode == Mode(4, patient=True)
    assert not machine.changes


def test_only_steps_of_as_many_tokens_are_compared() -> None:
    """A prompt's chunk that takes long says nothing of the mode that it came in."""
    machine = Machine()
    machine.run(busy, share=0.5, lasting=0.9)
    for _ in range(200):
        machine.run(busy, 0.5, 1e-9)
        machine.run(busy, 0.5, 1e-9)
        machine.run(lambda mode: 40 * busy(mode), 0.5, 1e-9, tokens=500)
    assert machine.pace.mode == Mode(4, patient=False)


def test_steps_that_are_never_alike_end_a_trial() -> None:
    machine = Machine()
    for number in range(2000):
        machine.run(busy, 0.5, 1e-9, tokens=number + 1)
    assert machine.pace.mode == Mode(4, patient=True)


def test_without_a_choice_of_waiting_there_are_threads_to_choose() -> None:
    machine = Machine(adjustable=False)
    machine.run(busy, share=0.5)
    assert machine.pace.mode == Mode(1, patient=True)


def test_one_thread_has_nothing_to_choose() -> None:
    machine = Machine(1, adjustable=False)
    machine.run(lambda mode: 0.01, share=0.9)
    assert machine.pace.mode == Mode(1, patient=True)
