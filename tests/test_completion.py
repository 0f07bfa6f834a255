"""What Tab completes: the scripts of `pinaivu completion`, run by the shells that there are."""

from __future__ import annotations

import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from tests.support.fake_model import FAKE
from tests.support.in_process_command import run_command
from tests.support.paths import ROOT
from tests.support.process_box import Box, environment

BASH = shutil.which("bash")
# What bash does at Tab: the variables of readline, the function, its replies.
AT_TAB = """
source {script}
COMP_LINE=$1 COMP_POINT=${{#1}}
compopt() {{ echo "compopt $*"; }}
_pinaivu_completion {program}
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("completion") / "home"
    for name in ("laptop", "lap top", "twin", "twin", "server"):
        run_command("keys", "create", "--name", name, home=home)
    run_command("keys", "revoke", "server", home=home)
    run_command("accounts", "create", "ann", home=home)
    return home


class Shell:
    """`pressed(line)`: what bash completes the line to, in a process of its own."""

    def __init__(self, folder: Path) -> None:
        self.program = folder / "pinaivu"
        self.program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m pinaivu_box "$@"\n')
        self.program.chmod(0o755)
        script = folder / "completion.bash"
        script.write_text(run_command("completion", "bash", home=None).stdout)
        self._code = AT_TAB.format(script=script, program=self.program)

    def pressed(self, line: str, home: Path) -> list[str]:
        assert BASH is not None
        done = subprocess.run(
            [BASH, "--norc", "-c", self._code, "bash", line],
            capture_output=True,
            text=True,
            env=environment(PYTHONPATH=str(ROOT), PINAIVU_HOME=str(home)),
        )
        assert done.returncode == 0 and done.stderr == "", done.stderr
        return [found for found in done.stdout.splitlines() if found]


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Shell:
    if BASH is None:
        pytest.skip("there is no bash")
    return Shell(tmp_path_factory.mktemp("bin"))


def test_commands_and_options_are_completed(shell: Shell, home: Path) -> None:
    assert shell.pressed("pinaivu re", home) == ["receipts", "restore", "reload"]
    assert shell.pressed("pinaivu keys ro", home) == ["rotate"]
    assert shell.pressed("pinaivu keys rotate --ov", home) == ["--overlap"]
    assert "chat-server" not in shell.pressed("pinaivu ", home)


def test_names_of_keys_and_accounts_are_completed(shell: Shell, home: Path) -> None:
    """Usable keys alone; by its id one whose name is not the only one or would need quotes."""
    found = shell.pressed("pinaivu keys revoke ", home)
    assert "laptop" in found and len(found) == 4
    assert len([name for name in found if name.startswith("key_")]) == 3
    assert shell.pressed("pinaivu keys edit lap", home) == ["laptop"]
    assert "ann" in shell.pressed("pinaivu accounts link ", home)


def test_names_with_colons_are_completed_after_the_colon(shell: Shell, home: Path) -> None:
    """As bash takes words apart at it, and replaces only the part behind."""
    assert "llama3.2:1b" in shell.pressed("pinaivu pull llama3", home)
    assert shell.pressed("pinaivu pull llama3.2:1", home) == ["1b"]


def test_models_of_the_running_box_are_completed(shell: Shell, tmp_path: Path) -> None:
    box = Box(tmp_path / "box", "--model", f"{FAKE}=fake:0").start()
    try:
        assert FAKE in shell.pressed("pinaivu show ", box.home)
        assert shell.pressed("pinaivu stop fake:", box.home) == ["1"]
    finally:
        box.end()


def test_nothing_is_made_or_changed_by_completing(shell: Shell, tmp_path: Path) -> None:
    """No home, no database, no restore that is finished, no error."""
    empty = tmp_path / "empty"
    for line in ("pinaivu keys edit ", "pinaivu show ", "pinaivu peers rm "):
        assert shell.pressed(line, empty) == []
    assert not empty.exists()
    (empty / "restore.ready").mkdir(parents=True)
    (empty / "pinaivu.db").write_text("no database")
    assert shell.pressed("pinaivu keys edit ", empty) == []
    assert sorted(path.name for path in empty.iterdir()) == ["pinaivu.db", "restore.ready"]


def test_a_locked_database_is_read(shell: Shell, home: Path) -> None:
    with closing(sqlite3.connect(home / "pinaivu.db", isolation_level=None)) as database:
        database.execute("BEGIN IMMEDIATE")
        assert shell.pressed("pinaivu keys edit lap", home) == ["laptop"]
        database.execute("ROLLBACK")


@pytest.mark.parametrize("name", ["bash", "zsh", "fish"])
def test_the_script_is_one_that_the_shell_reads(name: str, tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text(run_command("completion", name, home=None).stdout)
    assert "_PINAIVU_COMPLETE" in script.read_text()
    if (program := shutil.which(name)) is None:
        pytest.skip(f"there is no {name}")
    subprocess.run([program, "-n", str(script)], check=True)
