"""How the threads that compute wait for each other.

ggml's threads meet some hundred times in a step.  Whoever comes first spins, since the others come
within microseconds; but beside other programs the one that is waited for may have no processor,
perhaps because the waiting one has it.  So OpenMP's threads spin for long while the machine is
quiet, and sleep nearly at once while it is busy (see `pace`).
"""

from __future__ import annotations

import ctypes
import os
import threading
from pathlib import Path

# Tries before a waiting thread sleeps, each a `pause`: a fraction of a millisecond.  OpenMP's own
# default is some milliseconds, which is a time slice of whoever else wants the processor.
_PATIENT_SPINS = 20_000


def set_patience() -> None:
    """Choose how long threads spin, unless the environment says so.  Before OpenMP is loaded."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(_PATIENT_SPINS))


class Patience:
    """Whether OpenMP's threads spin for long.

    GNU's OpenMP spins a hundred times at most while it has more threads than there are processors
    (`do_spin` in its `wait.h`).  So that it has, another thread gets a team of its own, which does
    nothing and sleeps; it goes when that thread ends.
    """

    def __init__(self, threads: int) -> None:
        """Beside a team of so many."""
        self._openmp = _openmp()
        self._threads = threads
        self._end: threading.Event | None = None

    @property
    def adjustable(self) -> bool:
        return self._openmp is not None

    def set(self, *, patient: bool) -> None:
        if patient and self._end is not None:
            self._end.set()
            self._end = None
        elif not patient and self._end is None and self._openmp is not None:
            self._end = threading.Event()
            more = max(2, self._openmp.omp_get_num_procs() - self._threads + 2)
            threading.Thread(target=self._hold, args=(more, self._end), daemon=True).start()

    def _hold(self, threads: int, end: threading.Event) -> None:
        if self._openmp is not None:
            # What the team does has to be C's: free(NULL), which is nothing.
            nothing = ctypes.cast(ctypes.CDLL(None).free, ctypes.c_void_p)
            self._openmp.GOMP_parallel(nothing, None, threads, 0)
        end.wait()


def _openmp() -> ctypes.CDLL | None:
    """GNU's OpenMP, if this process has it."""
    try:
        library = ctypes.CDLL("libgomp.so.1", mode=os.RTLD_NOLOAD)
        library.GOMP_parallel.argtypes = (
            *(ctypes.c_void_p, ctypes.c_void_p),
            *(ctypes.c_uint, ctypes.c_uint),
        )
        library.GOMP_parallel.restype = None
    except (OSError, AttributeError):
        return None
    return library


def waited_seconds() -> float:
    """How long this process's threads were ready to run and had no processor, in all; 0 where the
    kernel does not say."""
    total = 0
    try:
        for task in Path("/proc/self/task").iterdir():
            try:
                total += int((task / "schedstat").read_text().split()[1])
            except (OSError, IndexError, ValueError):
                continue  # it has just ended
    except OSError:
        return 0.0
    return total / 1e9
