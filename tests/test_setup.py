"""The setup of a clone: it is never silent for long, and says what is wrong in one sentence."""

from __future__ import annotations

import os
import pty
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.process_box import wait_until

ROOT = Path(__file__).parent.parent
BUILD = ROOT / "build"
# A step that ends when its standard input does, and tells of itself a hundred times faster.
LONG_STEP = f"""
import sys
sys.path.insert(0, {str(BUILD)!r})
import progress
progress.REWRITE_SECONDS = progress.REPEAT_SECONDS = 0.01
with progress.step("waiting for the test") as shown:
    sys.stdin.readline()
    shown.detail = "7/9"
    sys.stdin.readline()
print("over")
"""


def test_a_terminal_shows_one_line_that_is_rewritten() -> None:
    ours, theirs = pty.openpty()
    running = subprocess.Popen(
        [sys.executable, "-c", LONG_STEP], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=theirs, text=True,
    )  # fmt: skip
    os.close(theirs)
    assert running.stdin is not None
    shown = b""
    for wanted in (b"waiting for the test", b"7/9"):
        start = len(shown)
        while shown[start:].count(wanted) < 5:  # nothing happens, and it goes on telling
            shown += os.read(ours, 4096)
        running.stdin.write("\n")
        running.stdin.flush()
    while not shown.endswith(b"\n"):
        shown += os.read(ours, 4096)
    output, _ = running.communicate(timeout=60)
    assert output == "over\n"
    assert shown.count(b"\n") == 1 and shown.count(b"\rbuild: waiting for the test") >= 10


def test_elsewhere_it_is_a_line_now_and_then(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with log.open("w") as errors:
        running = subprocess.Popen(
            [sys.executable, "-c", LONG_STEP], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=errors, text=True,
        )  # fmt: skip
    wait_until(lambda: len(log.read_text().splitlines()) >= 5, "it to tell of itself again")
    running.communicate("\n\n", timeout=60)
    assert "\r" not in log.read_text() and "\x1b" not in log.read_text()
    assert all(line.startswith("build: waiting for the test") for line in log.open())


def test_every_long_command_of_the_setup_is_a_step() -> None:
    """What can take seconds runs inside one: nothing is run quietly anywhere else."""
    for name in ("environment.py", "llama.py", "tasks.py", "cuda.py", "ggml_backend.py"):
        lines = (BUILD / name).read_text().splitlines()
        for number, line in enumerate(lines):
            called = line.strip().startswith(("run_quietly(", "pip("))
            if not called:
                continue
            indent = len(line) - len(line.lstrip())
            above = [one for one in lines[:number] if one.strip()]
            outer = next(one for one in reversed(above) if _indent(one) < indent)
            assert outer.strip().startswith(("with step(", "def pip(")), f"{name}: {line}"


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


@pytest.mark.parametrize("variable", ["PINAIVU_BUILD_CACHE", "XDG_CACHE_HOME", "HOME"])
def test_a_cache_that_cannot_be_written_is_one_sentence(tmp_path: Path, variable: str) -> None:
    clone, file = tmp_path / "clone", tmp_path / "file"
    shutil.copytree(BUILD, clone / "build", ignore=shutil.ignore_patterns("__pycache__"))
    file.write_text("")
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in ("PINAIVU_BUILD_CACHE", "XDG_CACHE_HOME")
    }
    done = subprocess.run(
        [sys.executable, "-E", "-s", "-S", str(clone / "build/setup.py"), "run"],
        env={**kept, variable: str(file / "inside")},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1 and not done.stdout
    assert line.startswith("build: the cache folder ") and str(file) in line
    assert "PINAIVU_BUILD_CACHE=" in line
    assert not (clone / ".venv").exists()
