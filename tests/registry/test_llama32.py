"""The two names in the guides, as Ollama's registry has them: pulled, served, and described."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pinaivu_box.models.partial_file import PIECE_BYTES
from tests.support import gguf_files
from tests.support.docker_registry import INSTALLED, MISSING, docker_registry, push
from tests.support.in_process_command import run_command
from tests.support.llama32 import LICENSE, POLICY, STOP, TINY
from tests.support.process_box import Box
from tests.support.registry_server import RegistryServer, registry_server

QUESTION = {"role": "user", "content": "Why is the sky blue?"}
# What the family's template makes of it.
PROMPT = (
    "<|start_header_id|>user<|end_header_id|>\n\nWhy is the sky blue?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
)
TAGS = sorted(TINY)


@contextmanager
def small_registry(folder: Path) -> Iterator[str]:
    with registry_server() as server:
        for tag, model in TINY.items():
            layers = model.layer_list(model.weights())
            server.add_image(f"library/llama3.2:{tag}", layers, model.configuration())
        yield server.url


@contextmanager
def debians_registry(folder: Path) -> Iterator[str]:
    if not INSTALLED:
        pytest.skip(MISSING)
    with docker_registry(folder) as url:
        for tag, model in TINY.items():
            layers = model.layer_list(model.weights())
            push(url, "library/llama3.2", tag, layers, model.configuration())
        yield url


@pytest.fixture(scope="module", params=[small_registry, debians_registry])
def box(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    """A box that has pulled both."""
    folder = tmp_path_factory.mktemp("llama32")
    with request.param(folder) as url:
        (folder / "box.toml").write_text(f'[registry]\nollama = "{url}"\n')
        box = Box(folder / "home", "--config", str(folder / "box.toml")).start()
        for tag in TAGS:
            run_command("pull", f"llama3.2:{tag}", home=box.home)
        yield box
        box.end()


@pytest.mark.parametrize("tag", TAGS)
def test_a_chat_is_written_as_llama_3_has_it_though_the_file_has_no_template(
    box: Box, tag: str
) -> None:
    chat = {"model": f"llama3.2:{tag}", "messages": [QUESTION], "max_tokens": 4}
    answer = box.http("POST", "/v1/chat/completions", json=chat)
    assert answer.status_code == 200, answer.text
    text = {"model": f"llama3.2:{tag}", "prompt": PROMPT, "max_tokens": 1}
    raw = box.http("POST", "/v1/completions", json=text).json()
    assert answer.json()["usage"]["prompt_tokens"] == raw["usage"]["prompt_tokens"]
    receipt = box.http("GET", f"/v1/receipts/{answer.json()['request_id']}").json()
    digest = hashlib.sha256(TINY[tag].weights()).hexdigest()
    assert json.loads(receipt["signed_receipt"])["model_digest"] == digest
    assert receipt["opening"]["stop"] == STOP


@pytest.mark.parametrize("tag", TAGS)
def test_what_the_registry_says_is_kept(box: Box, tag: str) -> None:
    (file,) = (box.home / "models").rglob(f"*{tag}*.gguf.json")
    record = json.loads(file.read_text())
    assert record["license"] == f"{LICENSE}\n\n{POLICY}"
    assert record["parameters"] == {"stop": STOP}
    shown = box.http("POST", "/api/show", json={"model": f"llama3.2:{tag}"}).json()
    assert shown["license"] == record["license"] and "context_length" in str(shown["model_info"])
    assert shown["parameters"].splitlines()[0].split() == ["stop", '"<|start_header_id|>"']
    assert shown["details"]["family"] == "llama"
    assert shown["details"]["quantization_level"] == {"1b": "Q8_0", "3b": "Q4_K_M"}[tag]


# -- a disk that is full ---------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a file system of 160 MB, of which the box leaves 100 MB alone."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=160m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("only root can mount a file system here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def crowded(small_disk: Path, tmp_path: Path) -> Iterator[tuple[Box, RegistryServer]]:
    with registry_server() as server:
        config = f'models_dir = "{small_disk}"\n[registry]\nollama = "{server.url}"\n'
        (tmp_path / "box.toml").write_text(config)
        box = Box(tmp_path / "home", "--config", str(tmp_path / "box.toml")).start()
        yield box, server
        box.end()


def pull(box: Box, name: str) -> Any:
    return run_command("pull", name, home=box.home, check=False)


def test_a_disk_without_room_is_said_and_one_that_fills_meanwhile_as_well(
    crowded: tuple[Box, RegistryServer], small_disk: Path
) -> None:
    box, server = crowded
    server.add_ollama("library/large:1b", gguf_files.valid(data=20 * PIECE_BYTES))
    done = pull(box, "large:1b")
    assert done.returncode == 1 and "no room for large:1b" in done.stderr
    server.add_ollama("library/fits:1b", gguf_files.valid(data=10 * PIECE_BYTES))

    def fill() -> None:
        with (small_disk / "other").open("wb") as file:
            file.truncate(0)
            while True:
                try:
                    file.write(bytes(PIECE_BYTES))
                    file.flush()
                except OSError:
                    return

    server.before_file = fill
    done = pull(box, "fits:1b")
    assert done.returncode == 1 and "No space left" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    server.before_file = None
    (small_disk / "other").unlink()
    assert pull(box, "fits:1b").returncode == 0
    served = box.http("GET", "/v1/models").json()["data"]
    assert "fits:1b" in [model["id"] for model in served]
