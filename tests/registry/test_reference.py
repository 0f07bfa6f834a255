"""Names of models as users write them, and where they lead."""

from __future__ import annotations

from pathlib import Path

import pytest

from pinaivu_box.config import RegistryConfig
from pinaivu_box.errors import PullFailed
from pinaivu_box.registry.reference import (
    HubModel,
    LocalModel,
    Reference,
    RegistryModel,
    UrlModel,
    is_loopback,
    parse,
)

CONFIG = RegistryConfig(ollama="https://ollama.example", hub="https://hub.example")
OLLAMA, HUB = CONFIG.ollama, CONFIG.hub


@pytest.mark.parametrize(
    "text, expected",
    [
        ("llama3.2:1b", RegistryModel("llama3.2:1b", OLLAMA, "library/llama3.2", "1b")),
        ("llama3.2", RegistryModel("llama3.2:latest", OLLAMA, "library/llama3.2", "latest")),
        ("library/qwen3:0.6b", RegistryModel("qwen3:0.6b", OLLAMA, "library/qwen3", "0.6b")),
        ("ann/tiny:q4", RegistryModel("ann/tiny:q4", OLLAMA, "ann/tiny", "q4")),
        ("ollama.com/ann/tiny", RegistryModel("ann/tiny:latest", OLLAMA, "ann/tiny", "latest")),
        (
            "registry.ollama.ai/library/qwen3:4b",
            RegistryModel("qwen3:4b", OLLAMA, "library/qwen3", "4b"),
        ),
        (
            "ghcr.io/lab/models/tiny:1b",
            RegistryModel("ghcr.io/lab/models/tiny:1b", "https://ghcr.io", "lab/models/tiny", "1b"),
        ),
        (
            "localhost:5000/tiny",
            RegistryModel("localhost_5000/tiny:latest", "http://localhost:5000", "tiny", "latest"),
        ),
        (
            "hf.co/bartowski/Llama-3.2-1B-Instruct-GGUF:Q4_K_M",
            HubModel(
                "hf.co/bartowski/Llama-3.2-1B-Instruct-GGUF:Q4_K_M",
                HUB,
                "bartowski/Llama-3.2-1B-Instruct-GGUF",
                "Q4_K_M",
            ),
        ),
        ("huggingface.co/a/b", HubModel("hf.co/a/b:latest", HUB, "a/b", "")),
        ("hf.co/a/b:c-Q8_0.gguf", HubModel("hf.co/a/b:c-Q8_0", HUB, "a/b", "c-Q8_0.gguf")),
        (
            "https://example.com/models/Tiny-Q4_0.gguf?download=true",
            UrlModel("Tiny-Q4_0:latest", "https://example.com/models/Tiny-Q4_0.gguf?download=true"),
        ),
        (
            "http://127.0.0.1:8000/a%3A1b.gguf",
            UrlModel("a:1b", "http://127.0.0.1:8000/a%3A1b.gguf"),
        ),
        ("/srv/tiny:1b.gguf", LocalModel("tiny:1b", Path("/srv/tiny:1b.gguf"))),
        (
            "/srv/big-00001-of-00003.gguf",
            LocalModel("big:latest", Path("/srv/big-00001-of-00003.gguf")),
        ),
    ],
)
def test_a_name_leads_to_one_place(text: str, expected: Reference) -> None:
    assert parse(text, CONFIG) == expected


@pytest.mark.parametrize(
    "text",
    [
        "", ":", ":1b", "a:b:c", "a//b", "a/b/c", "../x", "a b", "llama3.2:1b\n", "-x", "a/../b",
        "hf.co/a", "hf.co/a/b/c", "hf.co/a/b:", "https://example.com/", "https://example.com/x.bin",
        "https:///x.gguf", "http://example.com/x.gguf", "https://a:b@example.com/x.gguf",
        "example.com/", "example.com:port/x:1", "https://[::1/x.gguf", "/srv/tiny.bin",
        "https://example.com/%2e%2e%2fx%0a.gguf", "x" * 200, "é:1b",
    ],
)  # fmt: skip
def test_a_text_that_is_no_name_is_refused_in_one_sentence(text: str) -> None:
    with pytest.raises(PullFailed) as caught:
        parse(text, CONFIG)
    assert "\n" not in caught.value.message
    assert caught.value.message.endswith(".")


def test_a_model_can_have_another_name_here() -> None:
    long = "https://example.com/" + "x" * 150 + ".gguf"
    assert parse(long, CONFIG, "mine").id == "mine:latest"
    assert parse("llama3.2:1b", CONFIG, "gpt-4o-mini:1").id == "gpt-4o-mini:1"
    with pytest.raises(PullFailed, match="--as"):
        parse("llama3.2:1b", CONFIG, "no name")


@pytest.mark.parametrize(
    "host, expected",
    [
        ("localhost", True), ("localhost:5000", True), ("127.0.0.1:1", True), ("[::1]:5000", True),
        ("127.9.9.9", True), ("example.com", False), ("127.0.0.1.example.com", False),
        ("10.0.0.1:80", False), ("localhost.example.com", False), ("", False),
    ],
)  # fmt: skip
def test_plain_http_is_for_this_machine_alone(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected
