"""The client zoo: what docs/clients.md prints is run as printed, with the real model."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.clients import page
from tests.clients.conftest import NodePackage
from tests.clients.programs import PROGRAMS
from tests.support.client_programs import PYTHON_OF_CLIENTS, run
from tests.support.process_box import Box


def fenced(title: str, language: str, box: Box) -> str:
    return page.fenced(title, language, box.url, box.key)


def lines(count: int) -> Callable[[str], bool]:
    return lambda printed: len([line for line in printed.splitlines() if line.strip()]) >= count


PYTHON: dict[str, tuple[str, Callable[[str], bool]]] = {
    "OpenAI, Python": (
        "a pydantic model is filled, a tool that is required is called, texts have vectors",
        lambda printed: re.search(r"^red=-?\d+ .*\nweather\n2 vectors$", printed, re.M) is not None,
    ),
    "OpenAI, Python, asyncio": ("three questions at once have three answers", lines(3)),
    "OpenAI, Python, Responses": (
        "a conversation is remembered, and its events are in the order that the SDK wants",
        lambda printed: printed.rstrip().endswith(("completed", "incomplete")),
    ),
    "OpenAI, Python, in the background": (
        "a response is polled, its events are told again, and a cancellation that is late is none",
        lambda printed: (
            "\n0 response.created\n" in printed
            and printed.rstrip().endswith(("\ncompleted", "\nincomplete"))
        ),
    ),
    "LangChain": (
        "chat, a bound tool, structured output and embeddings",
        lambda printed: (
            re.search(r"^add \['a', 'b'\]\nwidth=-?\d+ height=-?\d+\n\d+ numbers$", printed, re.M)
            is not None
        ),
    ),
    "LiteLLM": (
        "its OpenAI provider answers, with usage",
        lambda p: re.search(r"\d+$", p.strip()) is not None,
    ),
    "instructor": ("a validated object", lambda printed: printed.startswith("name=")),
    "OpenAI Agents SDK": (
        "an agent calls its tool through the Responses API and answers with the result",
        lambda printed: "tool_call_output_item" in printed,
    ),
    "Ollama, Python": (
        "chats, a stream, a schema, vectors, and what there is",
        lambda printed: (
            re.search(r"^red=-?\d+ .*\n2 vectors\ngguf \['smollm2:135m'\]$", printed, re.M)
            is not None
        ),
    ),
    "Anthropic": (
        "a tool that is required is used, and a stream has text",
        lambda printed: printed.startswith("tool_use weather ['city']\n") and lines(2)(printed),
    ),
}


@pytest.mark.parametrize("title", PYTHON)
def test_python(box: Box, tmp_path: Path, title: str) -> None:
    proves, holds = PYTHON[title]
    printed = run([str(PYTHON_OF_CLIENTS), "-c", fenced(title, "python", box)], tmp_path)
    assert holds(printed), f"{title} ({proves}) printed: {printed}"


def test_llm(box: Box, tmp_path: Path) -> None:
    """A model that its user has entered answers on the command line."""
    scripts = str(PYTHON_OF_CLIENTS.parent)
    settings = {"PATH": f"{scripts}:{os.environ['PATH']}", "LLM_USER_PATH": str(tmp_path)}
    (tmp_path / "extra-openai-models.yaml").write_text(fenced("llm", "yaml", box))
    printed = run(["sh", "-ec", fenced("llm", "sh", box)], tmp_path, **settings)
    assert printed.strip()


def test_curl(box: Box, tmp_path: Path) -> None:
    """A stream of events that ends as OpenAI's does."""
    if not shutil.which("curl"):
        pytest.skip("curl is not installed")
    printed = run(["sh", "-ec", fenced("curl", "sh", box)], tmp_path)
    assert printed.startswith('data: {"id":"chatcmpl-')
    assert printed.rstrip().endswith("data: [DONE]")


def test_node(box: Box, node: NodePackage) -> None:
    """It streams, and an error is of the class that the SDK's users catch."""
    script = node.folder / "client.mjs"
    script.write_text(fenced("OpenAI, Node", "js", box))
    printed = run([node.program, str(script)], node.folder)
    assert lines(2)(printed)
    assert printed.rstrip().endswith("UnprocessableEntityError 422")


def test_ollama_for_node(box: Box, node: NodePackage) -> None:
    """It chats, streams, embeds and lists, and an error is of its class."""
    script = node.folder / "ollama.mjs"
    script.write_text(fenced("Ollama, Node", "js", box))
    printed = run([node.program, str(script)], node.folder)
    assert printed.startswith(("length 8\n", "stop "))
    assert printed.rstrip().endswith("2 vectors, 1 models\nResponseError 404")


def test_every_client_of_the_page_is_run() -> None:
    # What programs sent is replayed in `test_agents`: they take gigabytes.
    programs = {program.title for program in PROGRAMS.values()} | {"What was tested"}
    assert page.titles() == {*PYTHON, *programs, "llm", "curl", "OpenAI, Node", "Ollama, Node"}
    for program in PROGRAMS.values():
        assert f"| {program.title} | {program.version} |" in page.PAGE
