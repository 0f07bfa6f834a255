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


# Files that take longest, longest first: whoever begins with them last ends last.
LONGEST = (
    "tests/test_binary.py", "tests/test_crash.py", "tests/test_backup.py",
    "tests/peering/test_joining.py", "tests/peering/test_relay.py", "tests/peering/test_pulling.py",
    "tests/peering/test_failover.py", "tests/test_serve.py", "tests/test_model_files.py",
    "tests/test_errors.py", "tests/test_limits_served.py", "tests/test_fuzz.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {file: place for place, file in enumerate(LONGEST)}

    def place(item: pytest.Item) -> int:
        return places.get(item.nodeid.partition("::")[0], len(places))

    items.sort(key=place)


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
