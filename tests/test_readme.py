"""README.md as a new user reads it: what it prints is run as printed, what it lists is so."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from pinaivu_box.openai.types import ChatRequest
from tests.support.in_process_command import run_command_json
from tests.support.process_box import PINAIVU, Box, environment

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
ADDRESS = "http://localhost:4001"
KEY = "sk-pnv-..."
# So that answers are short.
SHORT = "[engine]\ncontext = 192\n"


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    home = tmp_path_factory.mktemp("readme") / "home"
    home.mkdir()
    (home / "config.toml").write_text(SHORT)
    started = Box(home).start()
    yield started
    started.end()


def section(title: str) -> str:
    return README.split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]


def fenced(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def indented(title: str) -> str:
    """The commands of a section."""
    lines = section(title).splitlines()
    return textwrap.dedent("\n".join(line for line in lines if line.startswith("    ")))


# A small model may go on until its context is full: here its answers end sooner.
SHORTER = {
    'model="smollm2:135m",': 'model="smollm2:135m", max_tokens=40,',
    '"model": "smollm2:135m",': '"model": "smollm2:135m", "max_tokens": 40,',
}


def filled_in(text: str, box: Box, **more: str) -> str:
    for printed, value in {ADDRESS: box.url, KEY: box.key, **SHORTER, **more}.items():
        text = text.replace(printed, value)
    return text


def run(commands: str, box: Box, folder: Path) -> str:
    """In a shell that stops at the first failure, with a `pinaivu` to call; what it prints."""
    command = folder / "pinaivu"
    command.write_text("#!/bin/sh\nexec " + " ".join(PINAIVU) + ' "$@"\n')
    command.chmod(0o755)
    path = f"{folder}:{os.environ['PATH']}"
    done = subprocess.run(
        ["sh", "-ec", commands],
        cwd=folder,
        capture_output=True,
        text=True,
        env=environment(
            PATH=path, PYTHONPATH=str(ROOT), PINAIVU_HOME=str(box.home), PINAIVU_API_KEY=box.key
        ),
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def needs(*programs: str) -> None:
    for program in programs:
        if not shutil.which(program):
            pytest.skip(f"{program} is not installed")


def test_the_python_examples_print_an_answer(box: Box) -> None:
    plain, streamed = fenced("python")
    code = filled_in(plain + streamed, box)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment(), timeout=600
    )
    assert done.returncode == 0, done.stderr
    answer, joke = re.split(r"^req_\w+$", done.stdout, maxsplit=1, flags=re.MULTILINE)
    assert answer.strip()
    assert joke.strip()


def test_the_curl_example_prints_an_answer(box: Box, tmp_path: Path) -> None:
    needs("curl")
    (example,) = fenced("sh")
    answer = msgspec.json.decode(run(filled_in(example, box), box, tmp_path))
    assert answer["choices"][0]["message"]["content"].strip()


def test_the_commands_of_keys(box: Box, tmp_path: Path) -> None:
    needs("jq")
    made = run_command_json("keys", "create", home=box.home)
    printed = run(filled_in(indented("Keys"), box, **{"key_...": made["id"]}), box, tmp_path)
    first, second, third, *table = printed.splitlines()
    assert all(line.startswith("sk-pnv-") for line in (first, second, third))
    assert any("laptop" in line for line in table)
    assert any("60 rpm" in line for line in table)
    assert "key.rotate" in printed
    key = run_command_json("keys", "show", made["id"], home=box.home)
    assert (key["state"], key["blocked"], key["policy"]["rpm"]) == ("revoked", "ask Ann first", 120)
    accounts = run_command_json("accounts", "ls", home=box.home)
    assert ("ann", "admin") in {(one["name"], one["role"]) for one in accounts}


def test_the_commands_of_receipts(box: Box, tmp_path: Path) -> None:
    needs("curl")
    request_id = box.chat(max_tokens=4).json()["request_id"]
    receipt = box.http("GET", f"/v1/receipts/{request_id}").json()
    node_key = receipt["node_id"].removeprefix("node_")
    names = {"req_...": request_id, "NODE_KEY": node_key}
    printed = run(filled_in(indented("Verify a receipt"), box, **names), box, tmp_path)
    assert "trusted key" in printed
    assert request_id in printed
    assert "smollm2:135m" in printed.split("MODEL")[1]


def test_the_commands_of_measuring(box: Box, tmp_path: Path) -> None:
    """Both compare the box with itself; on less than the README would."""
    commands = filled_in(indented("Measure"), box, **{"http://localhost:8080": f"{box.url}/v1"})
    quick = "--requests 1 --prompt-tokens 8 --output-tokens 4 --warmup 0"
    commands = re.sub("--clients [0-9]+", quick, commands.replace(" --plot", " --pairs 1 --plot"))
    assert "tokens/s" in run(commands, box, tmp_path)
    assert (tmp_path / "gaps.svg").exists()


def test_the_readme_lists_the_parameters_that_are_served() -> None:
    listed = section("Call it").split("OpenAI's parameters: ")[1].split("Anything else")[0]
    named = set(re.findall(r'[`"](\w+)[`".]', listed))
    assert {field.name for field in msgspec.structs.fields(ChatRequest)} <= named


@pytest.mark.parametrize("address", re.findall(r"`(?:GET )?(/[^`]+)`", section("Call it")))
def test_the_addresses_are_there(box: Box, address: str) -> None:
    request_id = box.chat(max_tokens=1).json()["request_id"]
    made = box.client.responses.create(model="smollm2:135m", input="hi", max_output_tokens=1)
    path = address.replace("/responses/{id}", f"/responses/{made.id}")
    path = path.replace("{id}", "smollm2:135m").replace("{request_id}", request_id)
    assert box.http("GET", path).status_code == 200


def test_the_files_that_it_names_are_there() -> None:
    for path in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", README):
        assert (ROOT / path).exists(), path
    for script in set(re.findall(r"\bbuild/\w+", README)):
        assert os.access(ROOT / script, os.X_OK), script
