"""Commands of this version ask a server of another one, which runs until it is restarted."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pinaivu_box.cli.client import Running, write_running
from tests.support.in_process_command import run_command

PEER = {"id": "node_1", "name": "ben", "state": "connected", "models": []}


class OtherVersion(BaseHTTPRequestHandler):
    """Knows less than this version asks about."""

    answer: bytes

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.answer)))
        self.end_headers()
        self.wfile.write(self.answer)

    def do_POST(self) -> None:
        self.do_GET()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), OtherVersion)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    write_running(tmp_path, Running(os.getpid(), f"http://127.0.0.1:{server.server_port}", "t"))
    yield tmp_path
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    "command", [("peers", "show", "ben"), ("ps",), ("upstreams",), ("pull", "a:1", "--from", "any")]
)
def test_what_the_server_does_not_say_is_one_sentence(
    home: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    answer = {**PEER, "data": [{"id": "m:1"}]}
    monkeypatch.setattr(OtherVersion, "answer", json.dumps(answer).encode(), raising=False)
    done = run_command(*command, home=home, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "another version than this command" in done.stderr
    assert "Restart it" in done.stderr and done.stderr.count("\n") == 1


def test_what_it_does_say_is_shown(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OtherVersion, "answer", json.dumps(PEER).encode(), raising=False)
    done = run_command("peers", "show", "ben", "--json", home=home)
    assert json.loads(done.stdout) == PEER


def test_an_answer_that_is_no_json_is_of_no_box(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OtherVersion, "answer", b"<!DOCTYPE html>", raising=False)
    done = run_command("ps", home=home, check=False)
    assert done.returncode == 1 and "No box is running" in done.stderr
