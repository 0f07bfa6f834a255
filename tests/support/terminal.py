"""A command at a terminal that a test types into."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import termios
import time
from pathlib import Path
from typing import Self

from tests.support.process_box import PINAIVU, environment

_SECONDS = 240.0  # against hanging, no claim about speed
_SIZES = ("COLUMNS", "LINES")
_ESCAPES = re.compile(r"\x1b(?:\[[0-9;?]*[ -/]*[@-~]|[()][A-Z0-9]|[=>])")
CTRL_C, CTRL_D, CTRL_U = "\x03", "\x04", "\x15"


class CommandTerminal:
    """`shown` is what it has printed so far, without colours and movements of the cursor."""

    def __init__(self, *command: str, columns: int = 80, **env: str) -> None:
        self._ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        kept = {name: value for name, value in environment(**env).items() if name not in _SIZES}
        self.process = subprocess.Popen(
            command,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(theirs, termios.TIOCSCTTY, 0),  # Ctrl-C is a signal
            # This terminal does not tell where its cursor is.
            env={**kept, "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"},
        )
        os.close(theirs)
        self._raw = b""
        self._read_to = 0  # what was expected lies before

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self._ours)

    @property
    def shown(self) -> str:
        return _ESCAPES.sub("", self._raw.decode(errors="replace")).replace("\r", "")

    def type(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def enter(self, text: str) -> None:
        self.type(f"{text}\r")

    def expect(self, text: str) -> str:
        """Wait until this is shown after what was expected before; returns what came until then."""
        deadline = time.monotonic() + _SECONDS
        while (at := self.shown.find(text, self._read_to)) < 0:
            if time.monotonic() > deadline or not self._read():
                raise AssertionError(f"{text!r} is not shown: {self.shown[self._read_to :]!r}")
        before = self.shown[self._read_to : at]
        self._read_to = at + len(text)
        return before

    def end(self) -> int:
        """Wait for its end; returns the exit status."""
        while self._read():
            pass
        return self.process.wait(_SECONDS)

    def _read(self) -> bool:
        """Read more; whether there may be more still."""
        ready, _, _ = select.select([self._ours], [], [], 1.0)
        if not ready:
            return True
        data = b""
        with contextlib.suppress(OSError):  # how a terminal says that nobody writes to it any more
            data = os.read(self._ours, 65536)
        self._raw += data
        return bool(data)


class Terminal(CommandTerminal):
    """A command of `pinaivu`."""

    def __init__(self, *args: str, home: Path, columns: int = 80, **env: str) -> None:
        super().__init__(*PINAIVU, *args, "--home", str(home), columns=columns, **env)
