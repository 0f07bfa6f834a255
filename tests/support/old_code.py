"""The code of an earlier commit, in a folder of its own."""

from __future__ import annotations

import contextlib
import io
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def is_there(commit: str) -> bool:
    """Whether this clone has the commit: a shallow one may not."""
    command = ("git", "-C", str(ROOT), "cat-file", "-e", f"{commit}^{{commit}}")
    with contextlib.suppress(OSError):
        return subprocess.run(command, stderr=subprocess.DEVNULL).returncode == 0
    return False


@contextlib.contextmanager
def checkout(commit: str) -> Iterator[Path]:
    """A folder with the package of that commit, which is removed at the end."""
    command = ("git", "-C", str(ROOT), "archive", commit, "pinaivu_box", "pyproject.toml")
    packed = subprocess.run(command, check=True, capture_output=True).stdout
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
            archive.extractall(folder, filter="data")
        yield Path(folder)
