"""Runs functions on hostile input in child processes with limits on CPU time, memory and wall time.

What a tenant, a peer or a model file sends can make a parser, a grammar compiler or a template run
for ever or take all memory; a thread cannot be stopped, a process can.  A sandbox is one child of
this program that runs one job at a time and stays for the next one.  A job that reaches a limit
ends with its process, and the next job gets a new one.

The limits hold for a job, not for the child's life.  CPU time is that of all its threads
(`setitimer(2)`, ITIMER_PROF), so that a busy machine makes no job fail; memory is address space
(`setrlimit(2)`, RLIMIT_AS).  This bounds what a job uses.  It does not confine what it may do:
only code of this package runs in it.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import os
import resource
import select
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, TypeVar

import msgspec

from pinaivu_box import child
from pinaivu_box.errors import ApiError, BoxError, InvalidBody, by_code
from pinaivu_box.fair_threads import FairThreads

Job = Callable[[bytes], bytes]
Result = TypeVar("Result")
Limit = Literal["time", "memory", "crash"]

_LENGTH = struct.Struct("<Q")
_SETUP_CPU_SECONDS = 60.0
_OUT_OF_MEMORY = 3  # exit status of a child
_READ_BYTES = 1 << 20


@dataclass(frozen=True)
class SandboxLimits:
    """What one job may use.

    `cpu_seconds` is CPU time of all threads, `memory_bytes` address space beyond what the child has
    when its setup is done, `wall_seconds` a guard against a job that waits instead of computing.
    """

    cpu_seconds: float
    memory_bytes: int
    wall_seconds: float = 120.0


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
    cpu_seconds: float
    memory_bytes: int
    setup: bytes


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
        self._stops: list[Callable[[], object]] = []
        self._cancelled = False

    @property
    def cancelled(self) -> bool:
        return self._cancelled

    def cancel(self) -> None:
        with self._lock:  # so that nothing is stopped that has ended, and may have begun anew
            self._cancelled = True
            for stop in self._stops:
                stop()

    @contextlib.contextmanager
    def calling(self, stop: Callable[[], object]) -> Iterator[None]:
        """While this lasts, cancelling calls `stop`.  Raises SandboxCancelled if it has been."""
        with self._lock:
            if self._cancelled:
                raise SandboxCancelled
            self._stops.append(stop)
        try:
            yield
        finally:
            with self._lock:
                self._stops.remove(stop)


class Sandbox:
    """One child.  `entry` names a function of this package, "pinaivu_box.module:make", that is
    called once in the child with `setup` and returns the function that every job is given to.

    The child starts with the first job (or `start`), and again after a job that was ended.
    """

    def __init__(self, entry: str, setup: bytes = b"", *, limits: SandboxLimits) -> None:
        self._start_frame = msgspec.msgpack.encode(
            _Start(entry, limits.cpu_seconds, limits.memory_bytes, setup)
        )
        self._limits = limits
        self._lock = threading.Lock()  # one job at a time
        self._process: subprocess.Popen[bytes] | None = None
        self._cancelled = False

    @property
    def pid(self) -> int | None:
        """The child's, None while there is none."""
        process = self._process
        return None if process is None else process.pid

    def start(self) -> None:
        """Start the child now, so that the first job need not wait for it."""
        with self._lock:
            self._running()

    def run(self, payload: bytes, cancellation: Cancellation | None = None) -> bytes:
        """The job's result; blocks.  Raises SandboxLimit, SandboxCancelled, and the ApiError that
        the job raised."""
        with self._lock:
            process = self._running()
            self._cancelled = False
            try:
                with (cancellation or Cancellation()).calling(self._cancel):
                    reply = self._exchange(process, payload, self._limits.wall_seconds)
            finally:
                if self._cancelled:  # perhaps after the reply: this child takes no other job
                    self._discard()
        if reply.code:
            raise _error(reply)
        return reply.result

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
        if child.executable_replaced():
            raise BoxError("the executable was replaced since the box started: restart the box")
        # Its standard error could quote what it was given, which belongs in no log.
        process = subprocess.Popen(
            child.command("sandbox"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self._process = process
        for pipe in _pipes(process):
            os.set_blocking(pipe.fileno(), False)
        reply = self._exchange(process, self._start_frame, max(_SETUP_CPU_SECONDS * 10, 600.0))
        if reply.code:
            raise _error(reply)
        return process

    def _exchange(self, process: subprocess.Popen[bytes], payload: bytes, seconds: float) -> _Reply:
        deadline = time.monotonic() + seconds
        stdin, stdout = _pipes(process)
        try:
            _write(stdin.fileno(), _LENGTH.pack(len(payload)), deadline)
            _write(stdin.fileno(), payload, deadline)
            (length,) = _LENGTH.unpack(_read(stdout.fileno(), _LENGTH.size, deadline))
            return msgspec.msgpack.decode(_read(stdout.fileno(), length, deadline), type=_Reply)
        except TimeoutError:
            self._discard()
            raise SandboxLimit("time", self._limits) from None
        except (EOFError, BrokenPipeError):
            process.wait()
            self._discard()
            if self._cancelled:
                raise SandboxCancelled from None
            raise SandboxLimit(_limit_of(process.returncode), self._limits) from None

    def _discard(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in _pipes(process):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


class SandboxPool:
    """Up to `size` sandboxes for the same kind of job, which tenants share fairly (see
    `fair_threads`)."""

    def __init__(
        self, entry: str, setup: bytes = b"", *, limits: SandboxLimits, size: int = 2
    ) -> None:
        self._all = [Sandbox(entry, setup, limits=limits) for _ in range(size)]
        self._idle = list(self._all)
        self._threads = FairThreads(size, "sandbox")
        self._closed = False

    @property
    def pids(self) -> list[int]:
        """Of the children that there are."""
        return [pid for sandbox in self._all if (pid := sandbox.pid) is not None]

    def start(self) -> None:
        """Start one child, so that the first job need not wait for it; does not block."""
        self._submit("", Sandbox.start)

    def run(
        self, payload: bytes, *, tenant: str = "", cancellation: Cancellation | None = None
    ) -> bytes:
        """As `Sandbox.run`; blocks while no sandbox is free for that tenant."""
        cancellation = cancellation or Cancellation()
        future = self._submit(tenant, lambda sandbox: sandbox.run(payload, cancellation))
        with cancellation.calling(future.cancel):
            try:
                return future.result()
            except CancelledError:
                raise SandboxCancelled from None

    async def run_async(self, payload: bytes, *, tenant: str = "") -> bytes:
        """As `run`, for the event loop; cancelling the task ends the job."""
        cancellation = Cancellation()
        future = self._submit(tenant, lambda sandbox: sandbox.run(payload, cancellation))
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

    def _submit(self, tenant: str, work: Callable[[Sandbox], Result]) -> Future[Result]:
        future: Future[Result] = Future()
        # A job that is cancelled waits on, but need not keep its payload.
        waiting = [work]
        future.add_done_callback(lambda _: waiting.clear())

        def job() -> None:
            if not future.set_running_or_notify_cancel():
                return
            sandbox = self._idle.pop()  # there are as many as threads
            try:
                if self._closed:
                    raise SandboxCancelled
                result = waiting[0](sandbox)
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(result)
            finally:
                self._idle.append(sandbox)

        self._threads.put(tenant, job)
        return future


def _error(reply: _Reply) -> ApiError:
    error = by_code(reply.code, reply.message, reply.param)
    if isinstance(error, InvalidBody):
        error.loc, error.kind, error.param = tuple(reply.loc), reply.kind, reply.param
    return error


def _limit_of(status: int | None) -> Limit:
    if status == -signal.SIGPROF:
        return "time"
    return "memory" if status == _OUT_OF_MEMORY else "crash"


def _pipes(process: subprocess.Popen[bytes]) -> tuple[BinaryIO, BinaryIO]:
    if process.stdin is None or process.stdout is None:
        raise RuntimeError("the sandbox was started without pipes")
    return process.stdin, process.stdout  # type: ignore[return-value]  # typeshed says IO[bytes]


def _wait(descriptor: int, event: int, deadline: float) -> None:
    poll = select.poll()
    poll.register(descriptor, event)
    if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
        raise TimeoutError


def _write(descriptor: int, data: bytes, deadline: float) -> None:
    rest = memoryview(data)
    while rest:
        try:
            rest = rest[os.write(descriptor, rest) :]
        except BlockingIOError:
            _wait(descriptor, select.POLLOUT, deadline)


def _read(descriptor: int, length: int, deadline: float) -> bytes:
    """Raises EOFError, TimeoutError."""
    parts: list[bytes] = []
    while length:
        _wait(descriptor, select.POLLIN, deadline)
        part = os.read(descriptor, min(length, _READ_BYTES))
        if not part:
            raise EOFError
        parts.append(part)
        length -= len(part)
    return b"".join(parts)


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
    frames_in = sys.stdin.buffer
    try:
        _work(frames_in, frames_out)
    except MemoryError:
        os._exit(_OUT_OF_MEMORY)


def _work(frames_in: BinaryIO, frames_out: BinaryIO) -> None:
    first = _next(frames_in)
    if first is None:
        return
    start = msgspec.msgpack.decode(first, type=_Start)
    jobs: list[Job] = []

    def set_up(setup: bytes) -> bytes:
        module, _, name = start.entry.partition(":")
        jobs.append(getattr(importlib.import_module(module), name)(setup))
        return b""

    _limit_memory(start.memory_bytes)
    _send(frames_out, _run(set_up, start.setup, _SETUP_CPU_SECONDS))
    _limit_memory(start.memory_bytes)
    while jobs and (payload := _next(frames_in)) is not None:
        _send(frames_out, _run(jobs[0], payload, start.cpu_seconds))


def _run(job: Job, payload: bytes, cpu_seconds: float) -> _Reply:
    # The signal's default action ends the process, also in the middle of C code.
    signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
    try:
        return _Reply(job(payload))
    except MemoryError:
        raise
    except InvalidBody as error:
        loc, kind = list(error.loc), error.kind
        return _Reply(b"", error.code, error.message, error.param, loc, kind)
    except ApiError as error:
        return _Reply(b"", error.code, error.message, error.param)
    except Exception as error:
        # Only its kind: the text of an exception can quote what it was given.
        return _Reply(b"", ApiError.code, f"A job of this box failed with {type(error).__name__}.")
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _limit_memory(more: int) -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + more
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def _next(stream: BinaryIO) -> bytes | None:
    header = stream.read(_LENGTH.size)
    if len(header) < _LENGTH.size:
        return None
    (length,) = _LENGTH.unpack(header)
    payload = stream.read(length)
    return payload if len(payload) == length else None


def _send(stream: BinaryIO, reply: _Reply) -> None:
    data = msgspec.msgpack.encode(reply)
    stream.write(_LENGTH.pack(len(data)))
    stream.write(data)
    stream.flush()
