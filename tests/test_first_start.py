"""The first start on a terminal offers a model, once."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from pinaivu_box.models import known_models
from tests.support import gguf_files
from tests.support.registry_server import RegistryServer, registry_server
from tests.support.terminal import Terminal

OFFERED = ("llama3.2:3b", "llama3.2:1b", "qwen3:0.6b")


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    """A home whose registry has what may be offered."""
    with registry_server() as server:
        for name in OFFERED:
            server.add_ollama(f"library/{name}", gguf_files.valid(data=1000))
        yield with_registry(tmp_path / "home", server)


def with_registry(home: Path, server: RegistryServer) -> Path:
    home.mkdir()
    (home / "config.toml").write_text(f'[registry]\nollama = "{server.url}"\n')
    return home


def start(home: Path) -> Terminal:
    return Terminal("serve", "--port", "0", home=home)


def stop(terminal: Terminal) -> None:
    terminal.process.send_signal(signal.SIGTERM)
    assert terminal.end() == 0


def test_who_declines_is_not_asked_again(home: Path) -> None:
    with start(home) as terminal:
        terminal.expect("Pull ")
        terminal.expect("[Y/n]")
        terminal.enter("n")
        terminal.expect("Try it with curl")
        stop(terminal)
    with start(home) as terminal:
        assert "Pull " not in terminal.expect("Try it with curl")
        stop(terminal)
    assert not (home / "models").exists()


def test_who_accepts_has_the_model_and_is_not_asked_again(home: Path) -> None:
    with start(home) as terminal:
        name = terminal.expect(" (").split()[-1]
        assert name in OFFERED
        terminal.expect("[Y/n]")
        terminal.enter("")
        assert name in terminal.expect("Try it with curl")
        stop(terminal)
    with start(home) as terminal:
        assert "[Y/n]" not in terminal.expect("Try it with curl")
        stop(terminal)


def test_the_largest_that_has_room_is_offered() -> None:
    assert known_models.first(None).name == "llama3.2:3b"
    assert known_models.first(64 * 10**9).name == "llama3.2:3b"
    assert known_models.first(4 * 10**9).name == "llama3.2:1b"
    assert known_models.first(10**6).name == "qwen3:0.6b"
