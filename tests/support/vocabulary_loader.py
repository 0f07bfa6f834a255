"""llama.cpp in a child that loads the vocabulary of one file after the other, within limits."""

from __future__ import annotations

import os
import resource
import select
import subprocess
import sys
from pathlib import Path
from types import TracebackType

MAX_BYTES = 3 * 2**30  # of the child's address space, libraries included
_SECONDS = 180


class VocabularyLoader:
    """`deaths` counts the children that a file has ended; another one takes their place.  `peak` is
    the most memory that a child had, in bytes."""

    def __init__(self) -> None:
        self.deaths = 0
        self.peak = 0
        self._child: subprocess.Popen[str] | None = None

    def __enter__(self) -> VocabularyLoader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()

    def load(self, path: Path) -> str:
        """What llama.cpp makes of a file: "loaded", "refused", or how its process ended."""
        child = self._child = self._child or self._start()
        assert child.stdin is not None and child.stdout is not None
        child.stdin.write(f"{path}\n")
        child.stdin.flush()
        if not select.select([child.stdout], [], [], _SECONDS)[0]:
            child.kill()
        answer = child.stdout.readline().split()
        if len(answer) == 2:
            self.peak = max(self.peak, int(answer[1]))
            return answer[0]
        self.deaths += 1
        return f"signal {-self._end(child)}"

    def close(self) -> None:
        if self._child is not None:
            self._end(self._child)

    def _end(self, child: subprocess.Popen[str]) -> int:
        for pipe in (child.stdin, child.stdout):
            if pipe is not None:
                pipe.close()
        self._child = None
        return child.wait()

    @staticmethod
    def _start() -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "tests.support.vocabulary_loader"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=Path(__file__).parents[2],
        )


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MAX_BYTES, MAX_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    import llama_cpp.llama_cpp as llama

    params = llama.llama_model_default_params()
    params.vocab_only = True
    for line in sys.stdin:
        model = llama.llama_model_load_from_file(os.fsencode(line.rstrip("\n")), params)
        if model:
            llama.llama_model_free(model)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print("loaded" if model else "refused", peak, flush=True)


if __name__ == "__main__":
    main()
