"""Fixtures: one box shared by the tests that leave it as they found it, and fresh ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.support.process_box import Box

# The same examples in every run, however slow the machine: a run that finds something new by chance
# is for `tests/fuzz`, not for who submits something else.
settings.register_profile(
    "steady", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("steady")


@pytest.fixture(scope="session")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    """A running box with the real model.  Do not stop it, kill it or revoke its key."""
    started = Box(tmp_path_factory.mktemp("shared") / "home").start()
    yield started
    started.end()


@pytest.fixture
def new_box(tmp_path: Path) -> Iterator[Callable[..., Box]]:
    """`new_box(*serve_args, env={...}, config="...")`: a box of the test's own, ended with it."""
    made: list[Box] = []

    def make(*args: str, env: dict[str, str] | None = None, config: str = "") -> Box:
        if config:
            file = tmp_path / f"box{len(made)}.toml"
            file.write_text(config)
            args = ("--config", str(file), *args)
        made.append(Box(tmp_path / f"home{len(made)}", *args, env=env))
        return made[-1].start()

    yield make
    for one in made:
        one.end()
