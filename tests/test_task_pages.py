"""The README and the pages by task, as a new user follows them: each block of commands is run as it
is printed, from the top of the page to its end, or is listed below with the reason why not."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from pinaivu_box.models import bundled
from tests.support.document_commands import Commands
from tests.support.documents import README, Block, blocks
from tests.support.in_process_command import run_command_json
from tests.support.process_box import Box

FOLLOWED = (
    README, "docs/home.md", "docs/lab.md", "docs/company.md", "docs/keys.md", "docs/operating.md",
    "docs/verifying.md", "docs/faq.md", "docs/troubleshooting.md",
)  # fmt: skip
# Output, configuration (tests/test_documents.py), and lists of addresses are no commands.
NOT_COMMANDS = {"text", "toml", "json"}
# The first line of each block that is not run here.
EXEMPT = {
    "curl -fsSLO https://github.com/pinaivu/pinaivu-box/releases/latest/download/install.sh": (
        "no release is published yet; the installer has tests of its own"
    ),
    "build/binary && docker compose -f build/compose.yaml up -d": (
        "needs Docker; the image has tests of its own"
    ),
    "build/run": "it sets up what these tests run in, and serves until Ctrl-C",
    "build/binary": "compiles an executable; tests/test_binary.py has one",
    "build/test": "it runs these tests",
    "pinaivu service install              # under systemd, for this user; with sudo for all": (
        "needs systemd; tests/test_service.py has it"
    ),
    "source <(pinaivu completion bash)    # for Tab; also zsh, fish": (
        "for a shell of one's own; tests/test_completion.py runs it"
    ),
    "pinaivu serve": "it serves until Ctrl-C: the box of these tests was started so",
    "pinaivu peers invite --name kitchen        # on one box, with peering turned on: a ticket": (
        "takes two boxes: tests/peering/test_friends_page.py runs it"
    ),
}
# A small model may go on until its context is full: here its answers end sooner.
SHORT = {
    'model="smollm2:135m",': 'model="smollm2:135m", max_tokens=16,',
    '"model": "llama3.2:1b",': '"model": "llama3.2:1b", "max_tokens": 16,',
    '"model": "smollm2:135m", "messages"': '"model": "smollm2:135m", "max_tokens": 16, "messages"',
    "--clients 8": "--requests 1 --prompt-tokens 8 --output-tokens 4 --warmup 0",
    "--clients 16 ": "--requests 1 --prompt-tokens 8 --output-tokens 4 --warmup 0 --pairs 1 ",
}
# Run once, although several pages have it: it changes nothing and reads all models.
SLOW = "pinaivu doctor"
# What a block prints, at least; by its page and its first line.
_VERIFY = "pinaivu receipts verify receipt.json"
_AUDIT = "pinaivu receipts audit receipt.json --request request.json --answer answer.json"
PRINTED = {
    (README, "from openai import OpenAI"): ("req_",),
    (README, "export PINAIVU_API_KEY=sk-pnv-..."): ('"content":',),
    (README, 'pinaivu keys create --name laptop --expires 30d      # prints the key, only once'): (
        "sk-pnv-", "laptop", "60 rpm", "smollm2:135m",
    ),
    ("docs/home.md", "pinaivu search code"): ("llama3.2:1b", "smollm2:135m"),
    ("docs/keys.md", "pinaivu audit --since 2026-11-01                     # who changed what"): (
        "key.rotate",
    ),
    ("docs/verifying.md", f"{_VERIFY} --node-key NODE_KEY"): ("trusted key",),
    ("docs/verifying.md", f"{_VERIFY} --request request.json --answer answer.json"): ("answer",),
    ("docs/verifying.md", _AUDIT): ("agrees",),
}  # fmt: skip
CONFIG = """
[engine]
context = 192
[receipts]
transcripts = "plain"
"""


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    """With the models of the pages, which are all the bundled one."""
    home = tmp_path_factory.mktemp("pages") / "home"
    (home / "models").mkdir(parents=True)
    location = bundled.find()
    assert location is not None and location.offset == 0
    for name in ("llama3.2:1b", "llama3.2:3b"):
        (home / "models" / f"{name}.gguf").symlink_to(location.path)
    (home / "config.toml").write_text(CONFIG)
    started = Box(home).start()
    yield started
    started.end()


@pytest.fixture(scope="module")
def ran() -> set[str]:
    """Blocks that are SLOW, once they were run."""
    return set()


def commands_of(page: str) -> list[Block]:
    found = [one for one in blocks(page) if one.is_for_shell or one.language == "python"]
    return [block for block in found if block.first_line not in EXEMPT]


@pytest.mark.parametrize("page", FOLLOWED)
def test_a_page_is_followed(box: Box, tmp_path: Path, ran: set[str], page: str) -> None:
    for program in ("curl", "jq"):
        if not shutil.which(program):
            pytest.skip(f"{program} is not installed")
    request_id = box.chat(max_tokens=4).json()["request_id"]
    names = {
        **SHORT,
        "http://localhost:8080": f"{box.url}/v1",
        "key_...": run_command_json("keys", "create", home=box.home)["id"],
        "req_...": request_id,
        "NODE_KEY": run_command_json("id", home=box.home)["node_key"],
        "/srv/pinaivu": str(tmp_path / "restored"),
        "/var/lib/pinaivu": str(box.home),
        "/var/backups/pinaivu": str(tmp_path),
    }
    # Some pages begin where their reader has a receipt already.
    (tmp_path / "receipt.json").write_bytes(box.http("GET", f"/v1/receipts/{request_id}").content)
    commands = Commands(box, tmp_path, names)
    failures = []
    for block in commands_of(page):
        if block.text in ran:
            continue
        if block.first_line.startswith(SLOW):
            ran.add(block.text)
        try:
            printed = commands.run(block)
        except AssertionError as error:
            failures.append(f"{page}, line {block.line}: {error}")
            continue
        for words in PRINTED.get((page, block.first_line), ()):
            if words not in printed:
                failures.append(f"{page}, line {block.line} does not print {words!r}: {printed}")
    assert not failures, "\n".join(failures)


def test_every_block_is_run_or_exempt() -> None:
    friends = {one.language for one in blocks("docs/friends.md") if not one.indented}
    assert friends <= NOT_COMMANDS  # its indented blocks: tests/peering/test_friends_page.py
    languages = {
        block.language for page in FOLLOWED for block in blocks(page) if not block.indented
    }
    assert languages <= NOT_COMMANDS | {"sh", "python"}
    first_lines = {block.first_line for page in FOLLOWED for block in blocks(page)}
    assert set(EXEMPT) <= first_lines, "an exemption is for a block that is not there any more"
    assert {page for page, _ in PRINTED} <= set(FOLLOWED)
    assert {line for _, line in PRINTED} <= first_lines
