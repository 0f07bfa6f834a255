"""What a person sees who starts the box in a terminal of 80 columns: the banner, then its log."""

from __future__ import annotations

import logging
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from pinaivu_box.cli import addresses
from pinaivu_box.cli.banner import banner
from pinaivu_box.server_config import ServerConfig
from pinaivu_box.terminal_log import TerminalFormatter
from tests.support.fake_model import FAKE
from tests.support.in_process_command import run_command, run_command_json
from tests.support.process_box import Box, environment
from tests.support.terminal import Terminal

KEY = "sk-pnv-" + "k" * 43
NAMES = ["an-unusually-long-name-of-a-model:27b-q4_k_m", "second:1", "third:1"]


@pytest.fixture(autouse=True)
def columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


@pytest.mark.parametrize("url", ["http://localhost:4001", "http://[2001:db8:1:2:3:4:5:6]:4001"])
@pytest.mark.parametrize("secret", [KEY, None])
def test_the_banner_fits_80_columns(url: str, secret: str | None) -> None:
    devices = "CUDA0 NVIDIA GeForce RTX 4090, 25,757 MB, CUDA1 NVIDIA GeForce RTX 3060, 12,000 MB"
    others = [f"http://192.168.{number}.20:4001" for number in range(9)]
    link = f"{url}/login/link/{'t' * 20}"
    shown = banner(
        url, Path("/home/ann/.local/share/pinaivu"), NAMES * 9, secret, devices,
        others=others, fingerprint=":".join(["AB"] * 32), link=link,
        self_signed=Path("/home/ann/.local/share/pinaivu/tls/cert.pem"),
    )  # fmt: skip
    assert max(map(len, shown.splitlines())) <= 80
    assert shown.isascii() and "\x1b" not in shown
    for text in (f"{url}/v1\n", f"Pages     {url}/\n", f"Also at   {others[0]}/v1\n", link, *NAMES):
        assert text in shown
    assert (KEY in shown) == (secret is not None)


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
@pytest.mark.parametrize("tls", ["", '[server]\ntls = "self-signed"\n'], ids=["http", "https"])
def test_what_the_banner_says_can_be_pasted(tmp_path: Path, tls: str) -> None:
    home = tmp_path / "its home"
    home.mkdir()
    (home / "config.toml").write_text(tls)
    box = Box(home, "--model", f"{FAKE}=fake:0").start()
    try:
        _, _, examples = box.output.partition("Try it with curl:")
        shell, _, python = examples.partition("or with Python (pip install openai):")
        exports = "\n".join(line for line in shell.splitlines() if "export " in line)
        python = textwrap.dedent(python)
        for code in (shell, f"{exports}\n{sys.executable} - <<'END'\n{python}\nEND\n"):
            done = subprocess.run(
                ["sh", "-c", code], capture_output=True, text=True, timeout=120, env=environment()
            )
            assert done.returncode == 0 and done.stdout.strip(), done.stderr
            assert "error" not in done.stdout
    finally:
        box.end()


def test_the_banner_says_who_reaches_the_box(monkeypatch: pytest.MonkeyPatch) -> None:
    from pinaivu_box.tls import self_signed

    found = ["192.168.1.20", "10.0.0.7", "2001:db8::7"]
    monkeypatch.setattr(self_signed, "lan_addresses", lambda: found)
    monkeypatch.setattr(addresses, "_lan_address", lambda: found[0])
    wide, both, local = (ServerConfig(host=host) for host in ("0.0.0.0", "::", "127.0.0.1"))
    assert addresses.other_urls(wide, 4001) == ["http://10.0.0.7:4001"]
    assert addresses.other_urls(both, 1) == ["http://10.0.0.7:1", "http://[2001:db8::7]:1"]
    assert addresses.other_urls(local, 4001) == []
    assert [addresses.is_local(each) for each in (wide, both, local)] == [False, False, True]
    assert "--host 0.0.0.0" in banner("http://localhost:1", Path("/h"), [], None, on_lan=False)
    assert "--host 0.0.0.0" not in banner("http://10.0.0.7:1", Path("/h"), [], None)


def fields(**more: Any) -> dict[str, Any]:
    return {
        "request_id": "req_1", "key": "key_1", "key_name": "laptop", "model": "m:1",
        "status": 200, "prompt_tokens": 31, "cached_tokens": 0, "completion_tokens": 48,
        "tokens_per_s": 43.1, "legs": 1, "served_by": "here", "queue_ms": 1, "ttft_ms": 120,
        "total_ms": 1200, **more,
    }  # fmt: skip


def line(name: str, message: str, given: dict[str, Any], level: int = logging.INFO) -> str:
    record = logging.LogRecord(name, level, "", 0, message, (), None)
    record.fields = given
    return TerminalFormatter().format(record)


def test_a_request_is_one_short_line() -> None:
    shown = line("pinaivu.request", "request", fields())
    assert shown[8:] == "  laptop  m:1  31+48 tokens  first 0.12 s  43.1/s  here"
    refused = fields(status=503, ttft_ms=None, tokens_per_s=None, served_by=None, key_name=None)
    shown = line("pinaivu.request", "request", refused)
    assert shown[8:] == "  key_1  m:1  31+48 tokens  error 503"


@pytest.mark.parametrize("name", ["a" * 200, "two\nlines", "\x1b[2Jgone", "\u202egnirts", "\x9b2J"])
def test_names_break_no_line(name: str) -> None:
    of_request = fields(key_name=name, model=name, served_by="node_0123abcd,cluster")
    of_path = {**fields(key_name=name), "method": "GET", "path": f"/{name}"}
    for shown in (
        line("pinaivu.request", "request", of_request),
        line("pinaivu.http", "http", of_path),
        line("pinaivu.other", "a peer", {"name": name}, logging.WARNING)[:80],
    ):
        assert len(shown) <= 80 and shown.isprintable()


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "home"


def test_a_box_in_a_terminal(home: Path) -> None:
    """Its banner, a line for each request, nothing of prompts and keys, and no colours."""
    with Terminal("serve", "--port", "0", "--model", f"{FAKE}=fake:1", home=home) as terminal:
        shown = terminal.expect("print(answer")
        url = shown.split("Base URL")[1].split()[0].removesuffix("/v1")
        key = run_command_json("keys", "create", "--name", "lap top", home=home)["key"]
        body = {
            "model": FAKE, "max_tokens": 8,
            "messages": [{"role": "user", "content": "zanzibar"}],
        }  # fmt: skip
        headers = {"Authorization": f"Bearer {key}"}
        address = f"{url}/v1/chat/completions"
        answer = httpx.post(address, json=body, headers=headers, trust_env=False, timeout=60)
        assert answer.status_code == 200
        logged = terminal.expect("  here")
        (request,) = [each for each in logged.splitlines() if FAKE in each and "tokens" in each]
        assert "lap top" in request and "+8 tokens" in request and "first" in request
        assert len(request) <= 80
        terminal.process.send_signal(signal.SIGTERM)
        assert terminal.end() == 0
        assert "zanzibar" not in terminal.shown and key not in terminal.shown
        banner_lines = shown.split("Pinaivu Box")[1].splitlines()
        assert [each for each in banner_lines if len(each) > 80 and "Home " not in each] == []


@pytest.mark.parametrize(
    ("variables", "styled"), [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)]
)
def test_no_color_is_heeded(
    home: Path, variables: dict[str, str], styled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By tables, which have bold headings."""
    from tests.support import process_box

    run_command("keys", "create", "--name", "a", home=home)
    kept = {name: each for name, each in environment().items() if name != "NO_COLOR"}
    wanted = {**kept, "TERM": "xterm", **variables}
    monkeypatch.setattr(process_box, "environment", lambda **_: wanted)
    raw = process_box.raw_on_terminal("keys", "ls", home=home)[1]
    assert b"NAME" in raw.upper() and (b"\x1b[" in raw) == styled
