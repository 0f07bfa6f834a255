"""Runs the code blocks of pages as they are printed, on a box of the tests."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from tests.support.documents import ROOT, Block
from tests.support.in_process_command import run_command
from tests.support.process_box import PINAIVU, Box, environment

ADDRESS, KEY = "http://localhost:4001", "sk-pnv-..."
# A line for `pinaivu` alone, which needs no shell.
_PLAIN = re.compile(r"pinaivu [^|<>$`;&()*\\]*")


class Commands:
    """The blocks of pages, run in one folder with the home of a box.

    `names` are texts of pages and what stands for them here: addresses, keys, ids, paths.
    """

    def __init__(self, box: Box, folder: Path, names: Mapping[str, str]) -> None:
        self._folder = folder
        self._names = {ADDRESS: box.url, KEY: box.key, **names}
        self._environment = {
            "HOME": str(folder),
            "PINAIVU_HOME": str(box.home),
            "PINAIVU_API_KEY": box.key,
            "PINAIVU_BACKUP_PASSPHRASE": "correct horse battery staple",
        }
        command = folder / "pinaivu"
        command.write_text("#!/bin/sh\nexec " + shlex.join(PINAIVU) + ' "$@"\n')
        command.chmod(0o755)

    def run(self, block: Block) -> str:
        """What the block prints on standard output.  Raises AssertionError if a command fails."""
        text = self.filled_in(block.text)
        lines = [line for line in text.splitlines() if line.strip()]
        if block.language == "python":
            return self._run_process([sys.executable, "-c", text], block)
        if all(_PLAIN.fullmatch(_without_comment(line)) for line in lines):
            return "".join(self.run_line(line) for line in lines)
        return self._run_process(["sh", "-ec", text], block)

    def filled_in(self, text: str) -> str:
        any_name = "|".join(map(re.escape, self._names))
        return re.sub(any_name, lambda found: self._names[found[0]], text)

    def run_line(self, line: str) -> str:
        """A command of `pinaivu`, in this process, in the folder."""
        _, *args = shlex.split(line, comments=True)
        former = Path.cwd()
        os.chdir(self._folder)
        try:
            return run_command(*args, home=None, env=self._environment).stdout
        finally:
            os.chdir(former)

    def _run_process(self, command: list[str], block: Block) -> str:
        path = f"{self._folder}:{os.environ['PATH']}"
        done = subprocess.run(
            command,
            cwd=self._folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            env=environment(PATH=path, PYTHONPATH=str(ROOT), **self._environment),
            timeout=200,
        )
        where = f"{block.page}, line {block.line}"
        assert done.returncode == 0, f"{where} failed: {done.stderr}{done.stdout}"
        return done.stdout


def _without_comment(line: str) -> str:
    """Without what follows `  #` at the end of a line."""
    return re.sub(r"\s+#.*", "", line).strip()
