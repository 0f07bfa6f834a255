"""What Tab completes: the scripts of `pinaivu completion`, run by the shells that there are."""

from __future__ import annotations

import os
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
from tests.support.terminal import CTRL_U, CommandTerminal

BASH, ZSH, FISH = map(shutil.which, ("bash", "zsh", "fish"))
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


def environment_with_program(folder: Path, home: Path) -> dict[str, str]:
    """In which `pinaivu` is a command, as in a user's shell."""
    program = folder / "pinaivu"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m pinaivu_box "$@"\n')
    program.chmod(0o755)
    path = f"{folder}:{os.environ['PATH']}"
    return environment(PYTHONPATH=str(ROOT), PINAIVU_HOME=str(home), PATH=path)


def script_for(shell: str, folder: Path) -> Path:
    script = folder / f"completion.{shell}"
    script.write_text(run_command("completion", shell, home=None).stdout)
    return script


class Shell:
    """`pressed(line)`: what bash completes the line to, in a process of its own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        script = script_for("bash", folder)
        self._code = AT_TAB.format(script=script, program=folder / "pinaivu")

    def pressed(self, line: str, home: Path) -> list[str]:
        assert BASH is not None
        done = subprocess.run(
            [BASH, "--norc", "-c", self._code, "bash", line],
            capture_output=True,
            text=True,
            env=environment_with_program(self._folder, home),
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


@pytest.mark.skipif(FISH is None, reason="there is no fish")
def test_fish_completes(home: Path, tmp_path: Path) -> None:
    script, env = script_for("fish", tmp_path), environment_with_program(tmp_path, home)

    def pressed(line: str) -> dict[str, str]:
        """What fish offers, with the description beside it."""
        assert FISH is not None
        code = f"source {script}; complete -C '{line}'"
        command = [FISH, "--no-config", "-c", code]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
        lines = (found.partition("\t") for found in done.stdout.splitlines() if found)
        return {word: description for word, _, description in lines}

    assert pressed("pinaivu re") == {
        "receipts": "Show and verify receipts.",
        "reload": "Let the running box read its configuration again.",
        "restore": "Restore a backup.",
    }
    assert list(pressed("pinaivu keys edit lap")) == ["laptop"]
    assert list(pressed("pinaivu keys rotate --ov")) == ["--overlap"]
    assert "llama3.2:1b" in pressed("pinaivu pull llama3.2:1")


@pytest.mark.skipif(ZSH is None, reason="there is no zsh")
def test_zsh_completes(home: Path, tmp_path: Path) -> None:
    """At a terminal: nothing but zsh's line editor completes."""
    assert ZSH is not None
    script, env = script_for("zsh", tmp_path), environment_with_program(tmp_path, home)
    env |= {"ZDOTDIR": str(tmp_path)}
    with CommandTerminal(ZSH, "-f", "-i", columns=120, **env) as terminal:
        terminal.enter(f"autoload -U compinit && compinit -u -D; source {script}; print o''k")
        terminal.expect("ok")
        for typed, expected in (
            ("pinaivu keys ro", "tate"),
            ("pinaivu keys edit lap", "top"),
            ("pinaivu keys rotate --ov", "erlap"),
            ("pinaivu pull llama3.2:1", "b"),
        ):
            terminal.type(f"{typed}\t")
            terminal.expect(typed + expected)
            terminal.enter(CTRL_U + "print o''k")
            terminal.expect("\nok")
        terminal.type("pinaivu re\t")
        for listed in ("receipts  -- Show and", "restore   -- Restore a", "reload    -- Let the"):
            terminal.expect(listed)
