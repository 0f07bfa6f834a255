"""Jobs in child processes: what ends at a limit ends alone, and the next job is served."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pinaivu_box.errors import ApiError, BadRequest, InvalidBody
from pinaivu_box.sandbox import (
    Cancellation,
    Sandbox,
    SandboxCancelled,
    SandboxLimit,
    SandboxLimits,
    SandboxPool,
)
from tests.support.process_box import alive, wait_until
from tests.support.sandbox_jobs import pids_of

ENTRY = "tests.support.sandbox_jobs:make"
LIMITS = SandboxLimits(cpu_seconds=0.5, memory_bytes=256 << 20)
PATIENT = SandboxLimits(cpu_seconds=600, memory_bytes=256 << 20, wall_seconds=600)


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    made = Sandbox(ENTRY, b"setup, ", limits=LIMITS)
    yield made
    made.close()


@pytest.fixture
def pool() -> Iterator[SandboxPool]:
    made = SandboxPool(ENTRY, limits=PATIENT, size=2)
    yield made
    made.close()


def test_a_job_gets_the_setup_and_its_payload_and_the_child_stays(sandbox: Sandbox) -> None:
    assert sandbox.run(b"echo payload") == b"setup, payload"
    assert sandbox._process is not None
    assert sandbox.run(b"pid") == sandbox.run(b"pid") == str(sandbox._process.pid).encode()


def test_ten_megabytes_go_in_and_out(sandbox: Sandbox) -> None:
    payload = bytes(range(256)) * 40_000
    assert sandbox.run(b"echo " + payload) == b"setup, " + payload


@pytest.mark.parametrize(
    ("job", "limit"),
    [
        ("compute", "time"),
        ("compute-in-c", "time"),
        ("compute-in-threads", "time"),
        ("allocate", "memory"),
        ("crash", "crash"),
    ],
)
def test_a_job_that_reaches_a_limit_is_ended_and_the_next_one_runs(
    sandbox: Sandbox, job: str, limit: str
) -> None:
    before = int(sandbox.run(b"pid"))
    with pytest.raises(SandboxLimit) as raised:
        sandbox.run(job.encode())
    assert raised.value.limit == limit
    assert not alive(before)
    assert sandbox.run(b"echo again") == b"setup, again"


def test_a_job_that_waits_instead_of_computing_is_ended_too() -> None:
    sandbox = Sandbox(ENTRY, limits=SandboxLimits(600, 256 << 20, wall_seconds=0.2))
    with pytest.raises(SandboxLimit) as raised:
        sandbox.run(b"wait")
    assert raised.value.limit == "time"
    assert sandbox._process is None


def test_errors_for_a_user_arrive_whole_and_others_without_their_text(sandbox: Sandbox) -> None:
    with pytest.raises(BadRequest, match=r"It cannot be read\.") as refused:
        sandbox.run(b"refuse")
    assert refused.value.param == "grammar"
    with pytest.raises(InvalidBody) as invalid:
        sandbox.run(b"refuse-body")
    assert invalid.value.loc == ("body", "messages", 0, "role")
    assert (invalid.value.kind, invalid.value.param) == ("missing", "messages.0.role")
    with pytest.raises(ApiError) as failed:
        sandbox.run(b"fail a secret")
    assert "secret" not in failed.value.message and "ValueError" in failed.value.message
    assert sandbox.run(b"echo on") == b"setup, on"


def test_the_printed_output_of_a_job_is_no_reply(sandbox: Sandbox) -> None:
    assert sandbox.run(b"print reply") == b"reply"


def test_a_cancelled_job_ends_with_its_process(pool: SandboxPool, tmp_path: Path) -> None:
    cancellation, begun = Cancellation(), tmp_path / "begun"
    raised: list[BaseException] = []

    def run() -> None:
        try:
            pool.run(b"wait %s" % bytes(begun), cancellation)
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    wait_until(begun.exists, "the job")
    (pid,) = pids_of(pool)
    cancellation.cancel()
    thread.join()
    assert [type(error) for error in raised] == [SandboxCancelled]
    assert not alive(pid)
    assert pool.run(b"echo next") == b"next"
    with pytest.raises(SandboxCancelled):
        pool.run(b"echo never", cancellation)
    assert pool.run(b"echo last") == b"last"


def test_of_a_tenant_one_job_runs_at_a_time_and_others_do_not_wait_for_it(
    pool: SandboxPool,
) -> None:
    async def main() -> None:
        first, second = (
            asyncio.create_task(pool.run_async(b"wait", tenant="greedy")) for _ in range(2)
        )
        for number in range(3):
            text = str(number).encode()
            assert await pool.run_async(b"echo " + text, tenant="modest") == text
        assert not first.done() and not second.done()
        second.cancel()  # while it waits
        first.cancel()  # while it runs
        results = await asyncio.gather(first, second, return_exceptions=True)
        assert [type(one) for one in results] == [asyncio.CancelledError] * 2
        assert await pool.run_async(b"echo free", tenant="greedy") == b"free"
        both = await asyncio.gather(
            *(pool.run_async(b"pid", tenant=name) for name in ("greedy", "modest"))
        )
        assert len(set(both) & {str(pid).encode() for pid in pids_of(pool)}) == len(set(both))

    asyncio.run(main())


def test_the_tenant_served_longest_ago_is_next() -> None:
    pool = SandboxPool(ENTRY, limits=PATIENT, size=1)
    order: list[str] = []

    async def job(tenant: str) -> None:
        await pool.run_async(b"echo", tenant=tenant)
        order.append(tenant)

    async def main() -> None:
        await asyncio.gather(*(job(tenant) for tenant in ("a", "a", "a", "a", "b", "b", "c")))

    asyncio.run(main())
    pool.close()
    assert order == ["a", "b", "c", "a", "b", "a", "a"]


def test_no_child_outlives_who_started_it() -> None:
    code = f"""
from pinaivu_box.sandbox import Sandbox, SandboxLimits
import os, signal
sandbox = Sandbox({ENTRY!r}, limits=SandboxLimits(5, 1 << 28))
print(sandbox.run(b"pid").decode(), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    wait_until(lambda: not alive(int(done.stdout)), "the child to end")
