"""How many threads compute, and how they wait for each other, chosen from what steps take.

On a quiet machine all cores, and threads that spin.  Where other programs want the processors too,
that may be ten times slower than threads that sleep, or than fewer of them; which of these is best
depends on the machine, the model and the others, so it is tried: a few steps each.  This is pure:
`llama_runner` does what it says and tells it how long steps took.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

_LOOK_SECONDS = 0.5  # of computing, after which it looks whether threads had to wait
_BUSY_SHARE = 0.08  # of their time that threads wait for a processor, above which it tries
_TRIAL_STEPS = 4
_TRIAL_SECONDS = 0.15  # or fewer steps, if they take so long
_GAIN = 0.93  # of the time: what is less different is within the noise
_SLOW = 1.5  # times the best so far: more of such steps are not needed
_MAX_OTHER_STEPS = 64  # that are unlike those of the trial, before it is given up
_FIRST_PAUSE, _LAST_PAUSE = 1.0, 30.0  # seconds between two trials


class Mode(NamedTuple):
    threads: int
    patient: bool


@dataclass
class _Trial:
    """Of `modes`, the first is tried; steps are of `tokens` tokens."""

    modes: list[Mode]
    tokens: int = 0
    steps: int = 0
    seconds: float = 0.0
    others: int = 0
    best: Mode | None = None
    best_seconds: float = 0.0  # a step


class Pace:
    """`mode` is that of the next step; `busy` whether it is another one than on a quiet machine.

    `waited` says for how many seconds threads of this process had no processor so far.
    """

    def __init__(
        self, threads: int, waited: Callable[[], float], *, adjustable: bool = True
    ) -> None:
        self.mode = self._quiet = Mode(threads, patient=True)
        halves = []
        while threads > 1:
            halves.append(Mode(threads, patient=False) if adjustable else Mode(threads, True))
            threads //= 2
        halves.append(Mode(1, patient=not adjustable))
        self._modes = [self._quiet, *(mode for mode in halves if mode != self._quiet)]
        self._best = self._quiet
        self._waited, self._waited_before = waited, waited()
        self._computed = 0.0  # seconds since it looked
        self._pause, self._since_trial = _FIRST_PAUSE, 0.0
        self._trial: _Trial | None = None
        self.share = 0.0  # of their time that threads waited, when it last looked

    @property
    def busy(self) -> bool:
        return self._best != self._quiet

    def observe(self, tokens: int, seconds: float) -> bool:
        """Note a step of so many tokens.  Returns whether `busy` has changed."""
        if len(self._modes) == 1:
            return False
        if self._trial is not None:
            return self._observe_trial(self._trial, tokens, seconds)
        self._computed += seconds
        self._since_trial += seconds
        if self._computed >= _LOOK_SECONDS:
            waited = self._waited()
            time = self._computed * self.mode.threads
            self.share = (waited - self._waited_before) / time
            self._computed, self._waited_before = 0.0, waited
            # What a few threads wait does not tell whether all would have to.
            if self._since_trial >= self._pause and (self.busy or self.share > _BUSY_SHARE):
                self._trial = _Trial([self._best, *(m for m in self._modes if m != self._best)])
                self.mode = self._best
        return False

    def _observe_trial(self, trial: _Trial, tokens: int, seconds: float) -> bool:
        if not trial.tokens:
            trial.tokens = tokens
        if tokens != trial.tokens:
            trial.others += 1
            return self._end(trial) if trial.others > _MAX_OTHER_STEPS else False
        trial.steps += 1
        trial.seconds += seconds
        each = trial.seconds / trial.steps
        slow = trial.best is not None and each > _SLOW * trial.best_seconds
        whole = trial.steps >= _TRIAL_STEPS and trial.seconds >= _TRIAL_SECONDS
        if not (whole or slow or (trial.seconds >= 2 * _TRIAL_SECONDS and trial.steps > 1)):
            return False
        # The first is the one in force: only what is clearly better takes its place.
        if trial.best is None or each < _GAIN * trial.best_seconds:
            trial.best, trial.best_seconds = trial.modes[0], each
        trial.modes.pop(0)
        trial.steps, trial.seconds = 0, 0.0
        if trial.modes:
            self.mode = trial.modes[0]
            return False
        return self._end(trial)

    def _end(self, trial: _Trial) -> bool:
        before, busy = self._best, self.busy
        self._best = self.mode = trial.best or self._best
        # The longer nothing changes, the more rarely it is tried whether it has.
        same = self._best == before
        self._pause = min(2 * self._pause, _LAST_PAUSE) if same else _FIRST_PAUSE
        self._trial, self._since_trial, self._computed = None, 0.0, 0.0
        self._waited_before = self._waited()
        return busy != self.busy
