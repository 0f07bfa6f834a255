"""What the scripts here measure: a box of ours and a llama-server, each in a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import msgspec

from tests.support.process_box import Box, pinaivu_json

READY_SECONDS = 300.0


class Size(msgspec.Struct, frozen=True):
    """What both servers get: total context in tokens, sequences at a time, threads (0: default).

    `drafting` is ours alone.
    """

    context: int
    sequences: int
    threads: int = 0
    drafting: bool = True


@contextlib.contextmanager
def box(size: Size, model: str, checkout: Path | None = None) -> Iterator[Box]:
    """A running box in a temporary home that serves `model` (a path or fake:MS) as m:1.  Its code
    is this checkout's or another's."""
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder) / "home"
        home.mkdir()
        (home / "config.toml").write_text(
            # llama-server, too, gives each of its slots an equal part.
            f"[engine]\ncontext = {size.context // size.sequences}\nkv_tokens = {size.context}\n"
            f"max_sequences = {size.sequences}\nthreads = {size.threads}\nkeep_alive = '-1'\n"
            f"drafting = {str(size.drafting).lower()}\n"
        )
        started = Box(home, "--model", f"m:1={model}")
        if checkout:
            started.prefix = ("env", "-C", str(checkout))
        try:
            yield started.start()
            started.stop()
        finally:
            started.end()


def new_key(home: Path, name: str) -> str:
    key: str = pinaivu_json("keys", "create", "--name", name, home=home)["key"]
    return key


def llama_server_arguments(size: Size, model: str, more: list[str]) -> list[str]:
    threads = ["--threads", str(size.threads), "--threads-batch", str(size.threads)]
    return [
        *("--model", model),
        *("--ctx-size", str(size.context)),
        *("--parallel", str(size.sequences)),
        *(threads if size.threads else []),
        "--no-webui",
        *more,
    ]


@contextlib.contextmanager
def llama_server(program: Path, arguments: list[str]) -> Iterator[str]:
    """A running llama-server; its base URL."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [str(program), *arguments, "--host", "127.0.0.1", "--port", str(port)],
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            url = f"http://127.0.0.1:{port}"
            if not _ready(url, process):
                log.seek(0)
                sys.exit(f"llama-server did not start:\n{log.read()[-2000:]}")
            yield url + "/v1"
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()
            process.wait()


def _ready(url: str, process: subprocess.Popen[bytes]) -> bool:
    deadline = time.monotonic() + READY_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{url}/health", trust_env=False, timeout=5).status_code == 200:
                return True
        time.sleep(0.1)
    return False


def takes_ignore_eos(served: Box) -> bool:
    """Whether our API accepts the field; without it answers may end early."""
    body = {
        "model": "m:1",
        "messages": [{"role": "user", "content": "Hi"}],
        "max_tokens": 1,
        "ignore_eos": True,
    }
    return served.http("POST", "/v1/chat/completions", json=body).status_code == 200


def machine() -> dict[str, object]:
    """The processor, and how busy it was with other things: the load average of three times."""
    cpu, load = "unknown", "unknown"
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.partition(":")[2].strip() for line in lines if "model name" in line), cpu)
    with contextlib.suppress(OSError):
        load = " ".join(Path("/proc/loadavg").read_text().split()[:3])
    return {"cpu": cpu, "cores": os.cpu_count(), "load": load}


def cpu_seconds(pid: int) -> float:
    """What a process has computed so far, without its children."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")
