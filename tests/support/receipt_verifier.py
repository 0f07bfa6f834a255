"""`pinaivu receipts verify` as somebody runs it who has no box."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.support.process_box import PINAIVU, environment


def verify_offline(
    *args: str, home: Path, stdin: bytes = b""
) -> subprocess.CompletedProcess[bytes]:
    """`pinaivu receipts verify` in an environment that knows no box but an empty home."""
    return subprocess.run(
        [*PINAIVU, "receipts", "verify", *args],
        input=stdin,
        capture_output=True,
        timeout=300,
        env=environment(PINAIVU_HOME=str(home)),
    )
