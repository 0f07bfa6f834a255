"""The scripts of the pages in node, which asks them what a test wants to know."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

STATIC = Path(__file__).parent.parent.parent / "pinaivu_box" / "server" / "static"
_DRIVER = """
import { createInterface } from "node:readline";
%s
for await (const line of createInterface({ input: process.stdin })) {
  process.stdout.write(JSON.stringify(await answer(JSON.parse(line))) + "\\n");
}
"""


class Scripts:
    """The modules of `static/` in a folder where node takes them for modules."""

    def __init__(self, folder: Path) -> None:
        node = shutil.which("node")
        if node is None:
            pytest.skip("NOT TESTED: node is missing, and with it nothing runs the pages' scripts.")
        self._node = node
        self._folder = folder
        (folder / "package.json").write_text('{"type": "module"}')
        for file in STATIC.rglob("*.js"):
            target = folder / file.relative_to(STATIC)
            target.parent.mkdir(exist_ok=True)
            shutil.copy(file, target)

    def ask(self, script: str, questions: Iterable[Any]) -> list[Any]:
        """What `answer`, a function that the script defines, gives for each of the questions."""
        driver = self._folder / "driver.js"
        driver.write_text(_DRIVER % script)
        done = subprocess.run(
            [self._node, str(driver)],
            input="".join(json.dumps(question) + "\n" for question in questions),
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]
