"""Runs checks one after another, says what became of each, and writes it down."""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from tests.bench import servers
from tests.gpu.checks import Check, Failed, Machine, NotDone


@dataclass(frozen=True)
class Outcome:
    """`state` is passed, FAILED or not done; `found` what the check measured, or why not."""

    name: str
    what: str
    state: str
    found: str
    seconds: float


def run(check: Check, machine: Machine) -> Outcome:
    print(f"{check.name}: {check.what} ...", flush=True)
    started = time.monotonic()
    try:
        state, found = "passed", check.run(machine)
    except NotDone as reason:
        state, found = "not done", str(reason)
    except (Failed, AssertionError) as reason:
        state, found = "FAILED", str(reason)
    seconds = time.monotonic() - started
    print(f"{check.name}: {state} after {seconds:.0f} s: {found}", flush=True)
    return Outcome(check.name, check.what, state, found, seconds)


def status(outcomes: list[Outcome]) -> int:
    states = {one.state for one in outcomes}
    return 1 if "FAILED" in states else 2 if "not done" in states else 0


def write(folder: Path, machine: Machine, outcomes: list[Outcome]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{datetime.now(UTC):%Y-%m-%d}-gpu.md"
    host = servers.machine()
    lines = [
        f"# On a GPU, {datetime.now(UTC):%Y-%m-%d}",
        "",
        f"{machine.gpus or 'No GPU'}; {host['cpu']}, {host['cores']} cores.",
        "",
        "| check | state | seconds | found |",
        "| --- | --- | ---: | --- |",
        *(
            f"| {one.what} | {one.state} | {one.seconds:.0f} | {_one_line(one.found)} |"
            for one in outcomes
        ),
    ]
    path.write_text("\n".join(lines) + "\n")
    print(f"written to {path}")


def _one_line(text: str) -> str:
    return " ".join(text.split()).replace("|", "/")
