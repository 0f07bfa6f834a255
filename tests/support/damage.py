"""What happens to a home: pages that are overwritten, commands that are killed."""

from __future__ import annotations

import contextlib
import sqlite3
import subprocess
import sys
from pathlib import Path

from tests.support.paths import ROOT
from tests.support.process_box import environment


def corrupt_database(database: Path) -> None:
    """Overwrite the middle of a page that is in use."""
    with contextlib.closing(sqlite3.connect(database)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        (page,) = connection.execute(
            "SELECT rootpage FROM sqlite_schema WHERE name = 'requests_by_time'"
        ).fetchone()
        (size,) = connection.execute("PRAGMA page_size").fetchone()
    with database.open("r+b") as file:
        file.seek((page - 1) * size)
        file.write(b"\xff" * 100)


# Runs the command, and kills it before its Nth change of the file system.
KILLED = """
import os, signal, sys
left = int(sys.argv.pop(1))
def counted(real):
    def call(*args, **more):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **more)
    return call
for name in ("rename", "replace", "mkdir", "unlink", "rmdir", "fsync"):
    setattr(os, name, counted(getattr(os, name)))
from pinaivu_box.cli.main import main
main()
"""


def killed_before(number: int, *args: str, home: Path) -> bool:
    """Whether it was killed; else it came to its end."""
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(number), *args, "--home", str(home)],
        capture_output=True,
        text=True,
        env=environment(PYTHONPATH=str(ROOT)),
    )
    assert done.returncode in (0, -9), done.stderr
    return done.returncode == -9
