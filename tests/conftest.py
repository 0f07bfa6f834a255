"""Fixtures: one box shared by the tests that leave it as they found it, and fresh ones."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import HealthCheck, settings

from tests.support import process_box
from tests.support.process_box import Box, StartBox
from tests.support.terminal import Terminal

# Hundreds of processes import the package: without bytecode each would compile all of it, which
# takes longer than the rest of its start.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
# An engine's threads wait for each other by spinning, which is right on a machine of its own.  Here
# several boxes share few cores, and most of the CPU time would be spent on waiting.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# The same examples in every run, however slow the machine: a run that finds something new by chance
# is for `tests/fuzz`, not for who submits something else.
settings.register_profile(
    "steady", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("steady")


FOLDER = Path(__file__).parent
# Files that take longest, longest first: whoever begins with them last ends last.
LONGEST = (
    "tests/test_binary.py", "tests/clients/test_clients.py", "tests/test_crash.py",
    "tests/test_families.py", "tests/test_serve.py", "tests/test_doctor.py", "tests/test_api.py",
    "tests/test_chat.py", "tests/test_run.py", "tests/peering/test_joining.py",
    "tests/test_fuzz.py", "tests/test_receipts.py", "tests/test_readme.py",
    "tests/test_task_pages.py", "tests/test_troubleshooting.py", "tests/test_backup.py",
    "tests/peering/test_relay.py", "tests/peering/test_pulling.py",
    "tests/peering/test_failover.py", "tests/test_model_files.py", "tests/test_errors.py",
    "tests/test_limits_served.py", "tests/browser/test_pages.py",
    "tests/browser/test_chat_page.py", "tests/test_witness_http.py", "tests/test_upstream.py",
    "tests/engine/test_replay_bits.py", "tests/test_tampered_receipts.py",
    "tests/engine/test_exact_bits.py", "tests/test_retention.py", "tests/test_hostile_bodies.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Orders files by LONGEST, and marks tests as `in_process` whose files start no box.  Of this
    folder, those come last: they are short, so all workers end at about the same time."""
    places = {file: place for place, file in enumerate(LONGEST)}

    def place(item: pytest.Item) -> int:
        file = item.nodeid.partition("::")[0]
        is_short = in_process(item) and item.path.parent == FOLDER
        return places.get(file, len(places) + is_short)

    items.sort(key=place)
    for item in items:
        if in_process(item):
            item.add_marker(pytest.mark.in_process)


def in_process(item: pytest.Item) -> bool:
    return isinstance(item, pytest.Function) and not starts_boxes(item.module)


@cache
def starts_boxes(module: ModuleType) -> bool:
    """Whether a test file knows a box or a command in a process of its own."""
    commands = (process_box.pinaivu, process_box.pinaivu_json, process_box.environment, StartBox)
    return any(
        value in commands or (isinstance(value, type) and issubclass(value, (Box, Terminal)))
        for value in vars(module).values()
        if callable(value)
    )


@pytest.fixture(scope="session")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    """A running box with the real model.  Do not stop it, kill it or revoke its key."""
    started = Box(tmp_path_factory.mktemp("shared") / "home").start()
    yield started
    started.end()


@pytest.fixture(scope="module")
def module_box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartBox]:
    """`module_box(*serve_args, config="...")`: a running box that the tests of a file share."""
    boxes: list[Box] = []

    def start(*args: str, config: str = "") -> Box:
        folder = tmp_path_factory.mktemp("shared")
        if config:
            (folder / "box.toml").write_text(config)
            args = ("--config", str(folder / "box.toml"), *args)
        boxes.append(Box(folder / "home", *args))
        return boxes[-1].start()

    yield start
    for box in boxes:
        box.end()


@pytest.fixture(scope="module")
def fake_box(module_box: StartBox) -> Box:
    """A box that also has the model `fake:1`, which takes a millisecond for a token."""
    return module_box("--model", "fake:1=fake:1")


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
