"""What a box tells the service manager that started it, by real datagrams of a real process."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pinaivu_box.server.supervision import Supervision
from pinaivu_box.systemd.notify import Notifier
from tests.support.notify_socket import NotifySocket, abstract_name, environment_of
from tests.support.process_box import PINAIVU, UNDRAFTED, Box, environment, wait_until
from tests.support.waiting import soon

NewBox = Callable[..., Box]
SLOW = f'{UNDRAFTED}[[model]]\nname = "slow:1"\npath = "fake:20"\n'
WATCHDOG_SECONDS = 1.0


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[NotifySocket]:
    with NotifySocket(tmp_path / "notify") as manager:
        yield manager


def stream(box: Box, tokens: int) -> Any:
    return box.client.chat.completions.create(
        model="slow:1",
        messages=[{"role": "user", "content": "hi"}],
        max_tokens=tokens,
        stream=True,
    )


def test_it_is_ready_once_it_serves_and_its_children_are_no_services(
    manager: NotifySocket, new_box: NewBox
) -> None:
    box = new_box(env=manager.environment(), config=SLOW)
    assert set(manager.wait_for("READY")) == {"READY", "STATUS"}
    assert box.http("GET", "/health").status_code == 200
    manager.wait_for_status("Serving ")
    with stream(box, 1000) as running:
        next(iter(running))
        manager.wait_for_status(", 1 request running")
        variables = environment_of(box.engines()[0]["pid"])
    assert "PATH" in variables and "NOTIFY_SOCKET" not in variables
    assert not manager.having("WATCHDOG")  # nobody has asked for it


def test_a_start_that_takes_long_asks_for_time(manager: NotifySocket, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    with contextlib.closing(sqlite3.connect(home / "pinaivu.db")) as database:
        database.execute("BEGIN EXCLUSIVE")  # so that the box cannot open it yet
        process = subprocess.Popen(
            [*PINAIVU, "serve", "--home", str(home), "--port", "0"],
            stdout=subprocess.DEVNULL,
            env=environment(**manager.environment()),
        )
        try:
            assert int(manager.wait_for("EXTEND_TIMEOUT_USEC")["EXTEND_TIMEOUT_USEC"]) > 0
            assert manager.having("STATUS")[0]["STATUS"] == "Starting"
            assert not manager.having("READY")
            database.rollback()
            manager.wait_for("READY")
        finally:
            process.terminate()
            assert process.wait(60) == 0


def test_a_reload_is_told_and_drops_no_stream(manager: NotifySocket, new_box: NewBox) -> None:
    box = new_box(env=manager.environment(), config=SLOW)
    manager.wait_for("READY")
    before = time.monotonic()
    with stream(box, 150) as running:
        chunks = iter(running)
        next(chunks)
        box.process.send_signal(signal.SIGHUP)
        reloading = manager.wait_for("RELOADING")
        manager.wait_for("READY", 2)
        rest = list(chunks)
    assert before < int(reloading["MONOTONIC_USEC"]) / 1e6 < time.monotonic()
    assert rest[-1].choices[0].finish_reason == "length"
    assert rest[-1].choices[0].delta.content is not None or len(rest) > 1

    Path(box.args[1]).write_text("[server]\nprot = 1\n")
    box.process.send_signal(signal.SIGHUP)
    manager.wait_for("READY", 3)
    manager.wait_for_status("not reloaded: ")
    Path(box.args[1]).write_text(SLOW)
    box.process.send_signal(signal.SIGHUP)
    assert "not reloaded" not in manager.wait_for("READY", 4)["STATUS"]


def test_it_says_that_it_stops_and_asks_for_time_to_drain(
    manager: NotifySocket, new_box: NewBox
) -> None:
    box = new_box(env=manager.environment(), config=SLOW)
    manager.wait_for("READY")
    with stream(box, 100) as running:
        chunks = iter(running)
        next(chunks)
        box.process.send_signal(signal.SIGTERM)
        assert manager.wait_for("STOPPING")["STATUS"] == "Stopping: 1 request running"
        known = len(manager.having("EXTEND_TIMEOUT_USEC"))
        manager.wait_for("EXTEND_TIMEOUT_USEC", max(known, 1))
        assert list(chunks)[-1].choices[0].finish_reason == "length"
    assert box.process.wait(60) == 0
    last = [message for message in manager.messages if "WATCHDOG" not in message]
    assert not [
        message
        for message in last[last.index(manager.having("STOPPING")[0]) :]
        if "READY" in message
    ]


def test_the_watchdog_is_told_that_it_lives_while_it_does(
    manager: NotifySocket, new_box: NewBox
) -> None:
    box = new_box(env=manager.environment(WATCHDOG_SECONDS), config=SLOW)
    manager.wait_for("WATCHDOG", 2)
    with stream(box, 1000) as one, stream(box, 1000) as other:  # also under load
        next(iter(one)), next(iter(other))
        manager.wait_for("WATCHDOG", len(manager.having("WATCHDOG")) + 2)
    os.kill(box.process.pid, signal.SIGSTOP)
    stopped = Path(f"/proc/{box.process.pid}/stat")
    wait_until(lambda: stopped.read_text().rsplit(")", 1)[1].split()[0] == "T", "it to stop")
    time.sleep(0.1)  # for what was on its way
    known = len(manager.having("WATCHDOG"))
    time.sleep(2 * WATCHDOG_SECONDS)
    assert len(manager.having("WATCHDOG")) == known
    os.kill(box.process.pid, signal.SIGCONT)
    manager.wait_for("WATCHDOG", known + 1)


def test_the_watchdogs_signal_leaves_in_the_log_where_it_was(
    manager: NotifySocket, new_box: NewBox
) -> None:
    box = new_box(env=manager.environment(60.0))
    manager.wait_for("WATCHDOG")
    box.process.send_signal(signal.SIGABRT)
    assert box.process.wait(60) == -signal.SIGABRT
    assert "Fatal Python error: Aborted" in box.errors and "serve.py" in box.errors


@pytest.mark.anyio
async def test_a_socket_that_gives_no_answer_is_neither_ready_nor_alive(
    manager: NotifySocket, anyio_backend: object
) -> None:
    box: Any = SimpleNamespace(
        tls=None, admission=SimpleNamespace(draining=True), requests=SimpleNamespace(count=0)
    )
    notifier = Notifier(manager.address, WATCHDOG_SECONDS)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        async with Supervision(notifier) as supervision:
            supervision.watch(box, listener)
            assert await asyncio.to_thread(manager.wait_for, "EXTEND_TIMEOUT_USEC")
            await asyncio.sleep(0.3)
            assert not manager.having("READY") and not manager.having("WATCHDOG")

            async def answer(_: Any, writer: asyncio.StreamWriter) -> None:
                writer.write(b"HTTP/1.1 503 \r\n\r\n")  # it is not ready, but answers
                writer.close()

            server = await asyncio.start_server(answer, sock=listener)
            await soon(asyncio.to_thread(manager.wait_for, "WATCHDOG", 2))
            assert manager.having("READY")[0]["STATUS"] == "Not ready: shutting down"
            server.close()


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def test_an_abstract_socket() -> None:
    with NotifySocket(abstract_name()) as manager:
        Notifier.from_environment(manager.environment()).ready("fine\nREADY=0")
        assert manager.wait_for("READY") == {"READY": "1", "STATUS": "fine READY=0"}


@pytest.mark.parametrize(
    ("environ", "watchdog_seconds"),
    [
        ({"WATCHDOG_USEC": "3000000"}, 3.0),
        ({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": str(os.getpid())}, 3.0),
        ({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "1"}, 0.0),
        ({"WATCHDOG_USEC": "soon"}, 0.0),
        ({}, 0.0),
    ],
)
def test_the_environment_says_who_is_watched(
    environ: dict[str, str], watchdog_seconds: float
) -> None:
    variables = {**environ, "NOTIFY_SOCKET": "/nowhere", "HOME": "/"}
    notifier = Notifier.from_environment(variables)
    assert notifier and notifier.watchdog_seconds == watchdog_seconds
    assert variables == {"HOME": "/"}
    notifier.alive()  # nobody is there: nothing happens


def test_without_a_manager_nothing_is_sent() -> None:
    assert not Notifier.from_environment({"WATCHDOG_USEC": "3000000"})
    assert not Notifier.from_environment({"NOTIFY_SOCKET": "vsock:2:1234"})
    Notifier().ready("fine")
