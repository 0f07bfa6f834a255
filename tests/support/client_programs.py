"""Runs programs of other people against a box."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.support.process_box import environment

PYTHON_OF_CLIENTS = Path(sys.prefix) / "clients/bin/python"  # build/test puts it there


def run(command: list[str], folder: Path, **more: str) -> str:
    # Nobody phones home while we look, and nobody's own settings count.
    quiet = {"HOME": str(folder), "LITELLM_LOCAL_MODEL_COST_MAP": "True", "NO_PROXY": "*"}
    done = subprocess.run(
        command,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=600,
        env=environment(**quiet, **more),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
