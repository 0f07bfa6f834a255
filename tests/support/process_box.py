"""A real box in its own process and home, driven as its users drive it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, Self

import httpx
import openai

from pinaivu_box.tls.pinned import context_for
from tests.support.waiting import DEADLINE

MODEL = "smollm2:135m"
# A token a step: with drafts `fake:20` says 4,000 tokens in two seconds instead of eighty.
UNDRAFTED = "[engine]\ndrafting = false\n"
# What `pinaivu` is here: the source tree, or the executable that build/binary made.
PINAIVU = (
    [os.environ["PINAIVU_BINARY"]]
    if "PINAIVU_BINARY" in os.environ
    else [sys.executable, "-m", "pinaivu_box"]
)

_SIZES = ("COLUMNS", "LINES")  # which would be believed before the terminal


def environment(**more: str) -> dict[str, str]:
    """Ours without PINAIVU_*, which would change what is tested."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PINAIVU_")}
    return {**kept, **more}


def pinaivu(
    *args: str,
    home: Path | None,
    check: bool = True,
    env: Mapping[str, str] | None = None,
    **more: Any,
) -> subprocess.CompletedProcess[str]:
    """Run one command on a home, or one that takes none; its output as text."""
    done = subprocess.run(
        [*PINAIVU, *args, *(["--home", str(home)] if home else [])],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment(**(env or {})),
        **more,
    )
    if check and done.returncode != 0:
        raise AssertionError(f"pinaivu {args} exited {done.returncode}: {done.stderr}")
    return done


def pinaivu_json(*args: str, home: Path) -> Any:
    return json.loads(pinaivu(*args, "--json", home=home).stdout)


def on_terminal(*args: str, home: Path | None, columns: int = 80) -> tuple[int, str]:
    """Run one command on a terminal of that width; its exit status and what the terminal shows,
    without colours.  Lines that are too long are not folded."""
    status, shown = raw_on_terminal(*args, home=home, columns=columns)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode()).replace("\r\n", "\n")
    return status, text


def raw_on_terminal(*args: str, home: Path | None, columns: int = 80) -> tuple[int, bytes]:
    """As `on_terminal`, with colours and whatever else a terminal is told."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    done = subprocess.Popen(
        [*PINAIVU, *args, *(["--home", str(home)] if home else [])],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={name: value for name, value in environment().items() if name not in _SIZES},
    )
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # how a terminal says that nobody writes to it any more
        while data := os.read(ours, 65536):
            shown += data
    os.close(ours)
    return done.wait(300), shown


class Box:
    """`Box(home).start()`; `stop()` asks nicely, `kill()` is SIGKILL.  Start again as you like."""

    def __init__(self, home: Path, *args: str, env: dict[str, str] | None = None) -> None:
        self.home = home
        self.args = args
        self.env = env or {}
        self.prefix: tuple[str, ...] = ()  # of its command: where it is to live
        self.key = ""
        self.process: subprocess.Popen[str]
        self._clients: dict[tuple[str, str], openai.OpenAI] = {}
        self._output = home.with_name(home.name + ".out")
        self._errors = home.with_name(home.name + ".err")

    def start(self) -> Self:
        # run.json appears when the server listens; a killed server leaves its old one behind.
        (self.home / "run.json").unlink(missing_ok=True)
        with self._output.open("w") as out, self._errors.open("a") as err:
            self.process = subprocess.Popen(
                [
                    *self.prefix,
                    *PINAIVU,
                    "serve",
                    "--home",
                    str(self.home),
                    "--port",
                    "0",
                    *self.args,
                ],
                stdout=out,
                stderr=err,
                text=True,
                env=environment(**self.env),
            )
        deadline = time.monotonic() + DEADLINE
        while not (self.home / "run.json").exists() or "Try it" not in self.output:
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"the box did not start: {self.errors}")
            time.sleep(0.02)
        run = json.loads((self.home / "run.json").read_text())
        self.url = run["url"]
        self.key = self.key or self._printed_key()
        return self

    def _printed_key(self) -> str:
        words = self.output.split()
        return next((word for word in words if word.startswith("sk-pnv-")), "")

    @property
    def output(self) -> str:
        return self._output.read_text()

    @property
    def errors(self) -> str:
        return self._errors.read_text()

    def stop(self, seconds: float = DEADLINE) -> int:
        """SIGTERM; the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(seconds)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def end(self) -> None:
        if self.process.poll() is None:
            self.kill()
        for client in self._clients.values():
            client.close()
        self._clients.clear()

    @property
    def client(self) -> Any:
        """OpenAI's client, without its types: tests send and read what they do not allow."""
        return self.client_with(self.key)

    def client_with(self, key: str) -> Any:
        base_url = f"{self.url}/v1"
        if (base_url, key) not in self._clients:
            self._clients[base_url, key] = openai.OpenAI(
                base_url=base_url,
                api_key=key,
                max_retries=0,
                timeout=300,
                http_client=self._http_client(),
            )
        return self._clients[base_url, key]

    def _http_client(self) -> Any:
        """One that trusts the box's certificate; None over plain HTTP."""
        context = context_for(self.home, self.url)
        return openai.DefaultHttpxClient(verify=context) if context else None

    def http(
        self, method: str, path: str, *, key: str | None = None, **more: Any
    ) -> httpx.Response:
        """A plain request with this box's first key (or another, or none if empty)."""
        secret = self.key if key is None else key
        headers = {"Authorization": f"Bearer {secret}"} if secret else {}
        headers |= more.pop("headers", {})
        return httpx.request(
            method,
            self.url + path,
            headers=headers,
            timeout=300,
            trust_env=False,
            verify=context_for(self.home, self.url),
            **more,
        )

    def chat(self, text: str = "Say hello.", **more: Any) -> httpx.Response:
        body = {"model": MODEL, "messages": [{"role": "user", "content": text}], **more}
        return self.http("POST", "/v1/chat/completions", json=body)

    def engines(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.http("GET", "/v1/engines").json()["data"]
        return found


class StartBox(Protocol):
    """Starts a box with these arguments of `serve`, the configuration in `config`."""

    def __call__(self, *args: str, config: str = "") -> Box: ...


def wait_until(condition: Any, what: str, seconds: float = DEADLINE) -> Any:
    """Poll until `condition()` is true.

    It waits twice as long as the condition took before it asks again: what it waits for needs the
    processor too.
    """
    deadline = time.monotonic() + seconds
    while True:
        looked = time.monotonic()
        if result := condition():
            return result
        now = time.monotonic()
        if now > deadline:
            raise AssertionError(f"still waiting for: {what}")
        time.sleep(min(max(0.02, 2 * (now - looked)), 1.0))


def alive(pid: int) -> bool:
    """Whether a process exists and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # the second: it ended while this was read
        return False


def cpu_seconds(pid: int) -> float:
    """CPU time that a process has taken, without that of its children."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
