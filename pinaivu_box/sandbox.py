"""Runs functions on hostile input in child processes with limits on CPU time, memory and wall time.

What a tenant, a peer or a model file sends can make a parser, a grammar compiler or a template run
for ever or take all memory; a thread cannot be stopped, a process can.  A sandbox is one child of
this program that runs one job at a time and stays for the next one.  A job that reaches a limit
ends with its process, and the next job gets a new one.

The limits hold for a job, not for the child's life; the child sets them, and the kernel ends it.
CPU time is that of all its threads (`setitimer(2)`, ITIMER_PROF), so that a busy machine makes no
job fail; wall time (ITIMER_REAL) ends a job that waits; memory is address space (`setrlimit(2)`,
RLIMIT_AS).  This bounds what a job uses.  It does not confine what it may do: only code of this
package runs in it.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import resource
import signal
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import LifoQueue
from typing import IO, TYPE_CHECKING, Literal

import msgspec

from pinaivu_box import child
from pinaivu_box.errors import ApiError, BoxError, InternalError, InvalidBody, by_code
from pinaivu_box.fair_threads import FairThreads

# The child imports this module too, and starts in half the time without what only the parent needs:
# that is imported where it is used.
if TYPE_CHECKING:
    import subprocess

Job = Callable[[bytes], bytes]
Limit = Literal["time", "memory", "crash"]

_LENGTH = struct.Struct("<Q")
_OUT_OF_MEMORY = 3  # exit status of a child


class SandboxLimits(msgspec.Struct, array_like=True, frozen=True):
    """What one job may use.

    `cpu_seconds` is CPU time of all threads, `memory_bytes` address space beyond what the child has
    when its setup is done, `wall_seconds` a guard against a job that waits instead of computing.
    """

    cpu_seconds: float
    memory_bytes: int
    wall_seconds: float = 120.0


_SETUP_LIMITS = SandboxLimits(cpu_seconds=60.0, memory_bytes=0, wall_seconds=600.0)


class SandboxLimit(BoxError):
    """The job was ended: it reached the limit on `limit`, or its process crashed.

    `reason` is the predicate of a sentence for the user: "takes more than 2 s of CPU time".  The
    message is for logs.
    """

    def __init__(self, limit: Limit, limits: SandboxLimits) -> None:
        self.limit = limit
        self.reason = {
            "time": f"takes more than {limits.cpu_seconds:g} s of CPU time",
            "memory": f"takes more than {limits.memory_bytes >> 20} MB of memory",
            "crash": "takes more memory or deeper recursion than is allowed",
        }[limit]
        super().__init__(f"the job {self.reason} and was ended")


class SandboxCancelled(BoxError):
    """Whoever wanted the result cancelled the job."""

    def __init__(self) -> None:
        super().__init__("the job was cancelled")


class _Start(msgspec.Struct, array_like=True):
    entry: str
    setup: bytes
    limits: SandboxLimits


class _Reply(msgspec.Struct, array_like=True):
    """`result`, or the fields of an ApiError: see `errors.by_code` and `errors.InvalidBody`."""

    result: bytes = b""
    code: str = ""
    message: str = ""
    param: str | None = None
    loc: list[str | int] = []
    kind: str = ""


class Cancellation:
    """Cancels a job from another thread, also before it has begun."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stop: Callable[[], object] | None = None
        self.cancelled = False

    def cancel(self) -> None:
        with self._lock:  # so that nothing is stopped that has ended, and may have begun anew
            self.cancelled = True
            if self._stop is not None:
                self._stop()

    @contextlib.contextmanager
    def calling(self, stop: Callable[[], object]) -> Iterator[None]:
        """While this lasts, cancelling calls `stop`.  Raises SandboxCancelled if it has been."""
        with self._lock:
            if self.cancelled:
                raise SandboxCancelled
            self._stop = stop
        try:
            yield
        finally:
            with self._lock:
                self._stop = None


class Sandbox:
    """One child.  `entry` names a function of this package, "pinaivu_box.module:make", that is
    called once in the child with `setup` and returns the function that every job is given to.

    The child starts with the first job (or `start`), and again after a job that was ended.
    """

    def __init__(self, entry: str, setup: bytes = b"", *, limits: SandboxLimits) -> None:
        self._first = msgspec.msgpack.encode(_Start(entry, setup, limits))
        self._limits = limits
        self._lock = threading.Lock()  # one job at a time
        self._process: subprocess.Popen[bytes] | None = None
        self._cancelled = False

    def start(self) -> None:
        """Start the child now, so that the first job need not wait for it."""
        with self._lock:
            self._running()

    def run(self, payload: bytes, cancellation: Cancellation | None = None) -> bytes:
        """The job's result; blocks.  Raises SandboxLimit, SandboxCancelled, and the ApiError that
        the job raised."""
        with self._lock:
            process = self._running()
            try:
                with (cancellation or Cancellation()).calling(self._cancel):
                    return self._exchange(process, payload)
            finally:
                if self._cancelled:  # perhaps after the reply: this child takes no other job
                    self._discard()

    def close(self) -> None:
        """End the child, and with it the job that runs."""
        process = self._process
        if process is not None:
            process.kill()
        with self._lock:
            self._discard()

    def _cancel(self) -> None:
        self._cancelled = True
        process = self._process
        if process is not None:
            process.kill()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        self._discard()
        import subprocess

        # Its standard error could quote what it was given, which belongs in no log.
        self._process = subprocess.Popen(
            child.command("sandbox"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self._cancelled = False
        self._exchange(self._process, self._first)
        return self._process

    def _exchange(self, process: subprocess.Popen[bytes], payload: bytes) -> bytes:
        assert process.stdin is not None and process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            _send(process.stdin, payload)
        data = _receive(process.stdout)
        if data is None:
            status = process.wait()
            self._discard()
            if self._cancelled:
                raise SandboxCancelled
            raise SandboxLimit(_limit_of(status), self._limits)
        reply = msgspec.msgpack.decode(data, type=_Reply)
        if reply.code:
            raise _error(reply)
        return reply.result

    def _discard(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(BrokenPipeError), process:  # which also closes its pipes
            process.kill()


class SandboxPool:
    """`size` sandboxes for the same kind of job."""

    def __init__(
        self, entry: str, setup: bytes = b"", *, limits: SandboxLimits, size: int = 2
    ) -> None:
        self._all = [Sandbox(entry, setup, limits=limits) for _ in range(size)]
        # The one that was used last goes first: the others need no child until several jobs run.
        self._idle: LifoQueue[Sandbox] = LifoQueue()
        for sandbox in self._all:
            self._idle.put(sandbox)
        self._threads = FairThreads(size, "sandbox")
        self._closed = False

    def start(self) -> None:
        """Start one child, so that the first job need not wait for it; does not block."""

        def start() -> None:
            with contextlib.suppress(BoxError):  # the first job tries again, and tells
                self._all[-1].start()

        threading.Thread(target=start, daemon=True).start()

    def run(self, payload: bytes, cancellation: Cancellation | None = None) -> bytes:
        """As `Sandbox.run`; blocks while no sandbox is idle."""
        sandbox = self._idle.get()
        try:
            if self._closed:
                raise SandboxCancelled
            return sandbox.run(payload, cancellation)
        finally:
            self._idle.put(sandbox)

    async def run_async(self, payload: bytes, *, tenant: str) -> bytes:
        """As `run`, for the event loop; cancelling the task ends the job.  Tenants share the
        sandboxes fairly (see `fair_threads`)."""
        import asyncio
        from concurrent.futures import Future

        cancellation, future = Cancellation(), Future[bytes]()
        # A job that is cancelled waits on, but need not keep its payload.
        waiting = [payload]
        future.add_done_callback(lambda _: waiting.clear())

        def job() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(self.run(waiting[0], cancellation))
            except BaseException as error:
                future.set_exception(error)

        self._threads.put(tenant, job)
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            cancellation.cancel()
            raise

    def close(self) -> None:
        """End all children; jobs that wait are cancelled."""
        self._closed = True
        for sandbox in self._all:
            sandbox.close()
        self._threads.close()


def _error(reply: _Reply) -> ApiError:
    error = by_code(reply.code, reply.message, reply.param)
    if isinstance(error, InvalidBody):
        error.loc, error.kind, error.param = tuple(reply.loc), reply.kind, reply.param
    return error


def _limit_of(status: int) -> Limit:
    if status in (-signal.SIGPROF, -signal.SIGALRM):
        return "time"
    return "memory" if status == _OUT_OF_MEMORY else "crash"


# -- frames --------------------------------------------------------------------------------------


def _send(stream: IO[bytes], data: bytes) -> None:
    stream.write(_LENGTH.pack(len(data)))
    stream.write(data)
    stream.flush()


def _receive(stream: IO[bytes]) -> bytes | None:
    """The next frame; None at the stream's end."""
    header = stream.read(_LENGTH.size)
    if len(header) < _LENGTH.size:
        return None
    (length,) = _LENGTH.unpack(header)
    data = stream.read(length)
    return data if len(data) == length else None


# -- the child -----------------------------------------------------------------------------------


def main() -> None:
    """Frames in on stdin, replies out on the old stdout; the end of stdin is ours."""
    # Ctrl-C and systemd's SIGTERM reach the whole group; the parent decides when we end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError):  # if the machine runs out of memory, we go first
        Path("/proc/self/oom_score_adj").write_text("1000")
    # Libraries print; what they print must not land among the frames.
    frames_out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    try:
        _work(sys.stdin.buffer, frames_out)
    except MemoryError:
        os._exit(_OUT_OF_MEMORY)


def _work(frames_in: IO[bytes], frames_out: IO[bytes]) -> None:
    if (data := _receive(frames_in)) is None:
        return
    start = msgspec.msgpack.decode(data, type=_Start)
    jobs: list[Job] = []

    def set_up(setup: bytes) -> bytes:
        module, _, name = start.entry.partition(":")
        jobs.append(getattr(importlib.import_module(module), name)(setup))
        return b""

    _limit_memory(start.limits.memory_bytes)
    _reply(frames_out, set_up, start.setup, _SETUP_LIMITS)
    _limit_memory(start.limits.memory_bytes)
    while jobs and (payload := _receive(frames_in)) is not None:
        _reply(frames_out, jobs[0], payload, start.limits)


def _reply(stream: IO[bytes], job: Job, payload: bytes, limits: SandboxLimits) -> None:
    _send(stream, msgspec.msgpack.encode(_run(job, payload, limits)))


def _run(job: Job, payload: bytes, limits: SandboxLimits) -> _Reply:
    # The default action of their signals ends the process, also in the middle of C code.
    signal.setitimer(signal.ITIMER_PROF, limits.cpu_seconds)
    signal.setitimer(signal.ITIMER_REAL, limits.wall_seconds)
    try:
        return _Reply(job(payload))
    except MemoryError:
        raise
    except ApiError as error:
        loc, kind = (list(error.loc), error.kind) if isinstance(error, InvalidBody) else ([], "")
        return _Reply(b"", error.code, error.message, error.param, loc, kind)
    except Exception as error:
        # Only its kind: the text of an exception can quote what it was given.
        what = f"A job of this box failed with {type(error).__name__}."
        return _Reply(b"", InternalError.code, what)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)


def _limit_memory(more: int) -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + more
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
