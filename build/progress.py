"""Long steps of the setup say how long they have been at it: nobody should think that they hang."""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from common import say

REWRITE_SECONDS = 1.0  # on a terminal, where it is one line
REPEAT_SECONDS = 15.0  # elsewhere, such as in the log of a CI


class Step:
    """`detail` is shown behind its name."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.detail = ""
        self._terminal = sys.stderr.isatty()
        self._began = time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._tell, daemon=True)

    def begin(self) -> None:
        self._say()
        self._thread.start()

    def end(self) -> None:
        self._over.set()
        self._thread.join()
        if self._terminal:
            self._say()
            print(file=sys.stderr, flush=True)

    def _tell(self) -> None:
        while not self._over.wait(REWRITE_SECONDS if self._terminal else REPEAT_SECONDS):
            self._say()

    def _say(self) -> None:
        seconds = round(time.monotonic() - self._began)
        line = " ".join(filter(None, [self.name, self.detail, f"{seconds} s" if seconds else ""]))
        if self._terminal:
            print(f"\rbuild: {line}\x1b[K", end="", file=sys.stderr, flush=True)
        else:
            say(line)


@contextmanager
def step(name: str) -> Iterator[Step]:
    """While the body runs, standard error tells of it."""
    made = Step(name)
    made.begin()
    try:
        yield made
    finally:
        made.end()
