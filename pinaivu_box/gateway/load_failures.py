"""What went wrong with engines lately: when a model is tried again, which devices it leaves alone,
and how much less memory a device has than it said."""

from __future__ import annotations

import time
from dataclasses import dataclass

from pinaivu_box import backoff

_MIN_BACKOFF_SECONDS, _MAX_BACKOFF_SECONDS = 1.0, 60.0
_AVOID_SECONDS = 300.0  # for a device on which a model's engine has died twice in that time
_MISTRUST_SECONDS = 60.0  # after memory that was said to be free could not be had
_KEPT_FREE = 0.2  # of what was planned there when a device ran out of memory


@dataclass
class _ModelFailures:
    count: int = 0
    until: float = 0.0
    reason: str = ""


class LoadFailures:
    """By the id of the model, and by the name of the device."""

    def __init__(self) -> None:
        self._models: dict[str, _ModelFailures] = {}
        self._deaths: dict[tuple[str, str], list[float]] = {}
        self._missing: dict[str, tuple[int, float]] = {}  # bytes, and until when

    def clear(self) -> None:
        for kept in (self._models, self._deaths, self._missing):
            kept.clear()

    def reason(self, model_id: str) -> str | None:
        """Why the model has to wait, None if it need not."""
        return self._models[model_id].reason if self.seconds(model_id) > 0 else None

    def seconds(self, model_id: str) -> float:
        """For how long it has to wait."""
        failures = self._models.get(model_id)
        return failures.until - time.monotonic() if failures else 0.0

    def note(self, model_id: str, reason: str, *, first_free: bool = False) -> None:
        """An engine could not be started, or (`first_free`) has died."""
        failures = self._models.setdefault(model_id, _ModelFailures())
        failures.count += 1
        failures.reason = reason
        failures.until = time.monotonic()
        if counted := failures.count - first_free:
            failures.until += backoff.delay(counted, _MIN_BACKOFF_SECONDS, _MAX_BACKOFF_SECONDS)

    def forget(self, model_id: str) -> None:
        """What was before had nothing to do with what comes now."""
        self._models.pop(model_id, None)

    def note_death(self, model_id: str, devices: list[str]) -> None:
        """An engine of the model died while it computed on these GPUs."""
        now = time.monotonic()
        for device in devices:
            deaths = self._deaths.setdefault((model_id, device), [])
            deaths[:] = [*(at for at in deaths if now - at < _AVOID_SECONDS), now]

    def avoided(self, model_id: str) -> set[str]:
        """The devices that the model leaves alone for now."""
        since = time.monotonic() - _AVOID_SECONDS
        return {
            device
            for (model, device), deaths in self._deaths.items()
            if model == model_id and sum(at > since for at in deaths) > 1
        }

    def note_memory(self, device: str, free: int, planned: int) -> None:
        """The device was thought to have `free` bytes, and `planned` ones were too many."""
        more = free - planned + max(1, int(planned * _KEPT_FREE))
        until = time.monotonic() + _MISTRUST_SECONDS
        self._missing[device] = self.missing(device) + max(0, more), until

    def missing(self, device: str) -> int:
        """How many bytes less than it says the device is thought to have."""
        missing, until = self._missing.get(device, (0, 0.0))
        return missing if until > time.monotonic() else 0
