"""How the engine's tests run."""

from __future__ import annotations

from hypothesis import settings

# Nothing is timed: a busy machine must not fail an example that took long.
settings.register_profile("engine", deadline=None)
settings.load_profile("engine")
