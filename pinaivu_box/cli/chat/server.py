"""The server that a chat in the terminal asks: the one that runs on the home, or a child that ends
with the chat."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path
from typing import Any, Self

from pinaivu_box import child
from pinaivu_box.cli.call import Call, actor
from pinaivu_box.cli.client import answers, running_on
from pinaivu_box.errors import CliError

KEY_NAME = "pinaivu run"
_KEY_FILE = "terminal.key"
_LOG_FILE = "terminal.log"  # what the child prints
_START_SECONDS = 120.0
_STOP_SECONDS = 20.0
_POLL_SECONDS = 0.05


class ChatServer:
    """Use it as a context manager: a child that it started ends with it, and at the latest when
    this process does."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self._child: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._child is None:
            return
        assert self._child.stdin is not None
        self._child.stdin.close()
        try:
            self._child.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()

    def url(self) -> str:
        """Return the address of a server that answers, starting one if need be.  Raises
        CliError."""
        running = running_on(self._call.home)
        if running is None or not answers(self._call.home, running.url):
            running = self._start()
        return str(running.url)

    def _start(self) -> Any:
        """Raises CliError."""
        from pinaivu_box.home import prepare_home

        home = prepare_home(self._call.home)
        command = [*child.command("chat-server"), "--home", str(home)]
        if self._call.config_file is not None:
            command += ["--config", str(self._call.config_file)]
        with _private(home / _LOG_FILE) as log:
            self._child = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,  # its end ends the child
                stdout=subprocess.DEVNULL,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for the chat
            )
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline and self._child.poll() is None:
            running = running_on(home)
            if running is not None and running.pid == self._child.pid:
                return running
            time.sleep(_POLL_SECONDS)
        running = running_on(home)
        if running is not None and answers(home, running.url):  # somebody else was quicker
            return running
        raise CliError(_why_not_started(home / _LOG_FILE))


def key_of(call: Call, *, new: bool = False) -> str:
    """Return the secret of the key that chats in the terminal use on this home; made if there is
    none, or if a `new` one is wanted.  Raises CliError."""
    file = call.home / _KEY_FILE
    if not new:
        try:
            return file.read_text().strip()
        except FileNotFoundError:
            pass
        except OSError as error:
            raise CliError(f"{file} cannot be read: {error.strerror or error}.") from error
    secret = call.in_database(_create_key)
    temporary = file.with_name(f".{_KEY_FILE}.new")
    temporary.unlink(missing_ok=True)
    with _private(temporary) as target:
        target.write(f"{secret}\n".encode())
    temporary.replace(file)
    return str(secret)


async def _create_key(database: Any) -> str:
    from pinaivu_box.policy import Policy
    from pinaivu_box.store import accounts
    from pinaivu_box.store.new_keys import Draft, create

    draft = Draft(KEY_NAME, accounts.OWNER, Policy(scopes=("inference",)))
    _, secret = await create(database, draft, actor())
    return secret


def _private(path: Path) -> Any:
    """The file, empty and for nobody else."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    return os.fdopen(handle, "wb")


def _why_not_started(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    if lines and lines[-1].startswith("pinaivu: "):
        return lines[-1].removeprefix("pinaivu: ")
    return f"The box could not be started: see {log}, or run 'pinaivu serve'."
