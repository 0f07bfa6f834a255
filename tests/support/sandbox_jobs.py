"""Jobs for sandboxes, and the children that run them."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

from pinaivu_box.errors import BadRequest, InvalidBody
from pinaivu_box.sandbox import Sandbox, SandboxPool


def pid_of(sandbox: Sandbox) -> int | None:
    """Of its child, if there is one."""
    return None if sandbox._process is None else sandbox._process.pid


def pids_of(pool: SandboxPool) -> list[int]:
    """Of the children that there are."""
    return [pid for pid in map(pid_of, pool._all) if pid is not None]


def make(setup: bytes) -> Callable[[bytes], bytes]:
    def job(payload: bytes) -> bytes:
        word, _, argument = payload.partition(b" ")
        return JOBS[word](setup, argument)

    return job


def _echo(setup: bytes, argument: bytes) -> bytes:
    return setup + argument


def _pid(_setup: bytes, _argument: bytes) -> bytes:
    return str(os.getpid()).encode()


def _compute(_setup: bytes, _argument: bytes) -> bytes:
    while True:
        pass


def _compute_in_c(_setup: bytes, _argument: bytes) -> bytes:
    return str(pow(3, 3**30)).encode()


def _compute_in_threads(_setup: bytes, _argument: bytes) -> bytes:
    threads = [threading.Thread(target=_compute, args=(b"", b"")) for _ in range(2)]
    for thread in threads:
        thread.start()
    time.sleep(3600)
    return b""


def _wait(_setup: bytes, argument: bytes) -> bytes:
    """With an argument, a file of that name tells that the job has begun."""
    if argument:
        Path(os.fsdecode(argument)).touch()
    time.sleep(3600)
    return b""


def _allocate(_setup: bytes, _argument: bytes) -> bytes:
    return b"a" * 3_000_000_000


def _crash(_setup: bytes, _argument: bytes) -> bytes:
    os.abort()


def _refuse(_setup: bytes, _argument: bytes) -> bytes:
    raise BadRequest("It cannot be read.", param="grammar")


def _refuse_body(_setup: bytes, _argument: bytes) -> bytes:
    raise InvalidBody("field required", loc=("body", "messages", 0, "role"), kind="missing")


def _fail(_setup: bytes, argument: bytes) -> bytes:
    raise ValueError(argument.decode())


def _print(_setup: bytes, argument: bytes) -> bytes:
    print("a library prints", flush=True)
    os.write(1, b"and so does C code")
    return argument


JOBS = {
    b"echo": _echo,
    b"pid": _pid,
    b"compute": _compute,
    b"compute-in-c": _compute_in_c,
    b"compute-in-threads": _compute_in_threads,
    b"wait": _wait,
    b"allocate": _allocate,
    b"crash": _crash,
    b"refuse": _refuse,
    b"refuse-body": _refuse_body,
    b"fail": _fail,
    b"print": _print,
}
