"""Stand-ins for the programs of systemd: they note how they were called, and answer as told."""

from __future__ import annotations

import os
from pathlib import Path

_PROGRAM = """\
#!/bin/sh
printf '%s' "$(basename "$0")" >> "$CALLS"
for word in "$@"; do printf ' %s' "$word" >> "$CALLS"; done
echo >> "$CALLS"
case "$*" in
  *--version*) echo "systemd $VERSION ($VERSION.1)";;
  *--property=Version*) [ -z "$REFUSAL" ] || { echo "$REFUSAL" >&2; exit 1; };;
  *show*) echo "$SHOWN";;
  *restart*) [ -z "$FAILURE" ] || { echo "$FAILURE" >&2; exit 1; };;
esac
"""


class SystemdPrograms:
    """A folder with `systemctl` and `journalctl` for the PATH."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "programs"
        self._folder.mkdir()
        self._calls = folder / "calls"
        self._calls.touch()
        for name in ("systemctl", "journalctl"):
            program = self._folder / name
            program.write_text(_PROGRAM)
            program.chmod(0o755)

    def environment(
        self, *, version: int = 252, refusal: str = "", shown: str = "", failure: str = ""
    ) -> dict[str, str]:
        """`refusal` is what the manager says instead of answering, `failure` instead of starting;
        `shown` what it says of a unit."""
        return {
            "PATH": f"{self._folder}:{os.environ['PATH']}",
            "CALLS": str(self._calls),
            "VERSION": str(version),
            "REFUSAL": refusal,
            "SHOWN": shown,
            "FAILURE": failure,
        }

    def calls(self) -> list[str]:
        """How they were called since the last time, but for questions."""
        lines = self._calls.read_text().splitlines()
        self._calls.write_text("")
        return [line for line in lines if "--version" not in line and " show " not in line]
