"""docs/friends.md, and its section of the README, as two people follow them with a box each."""

from __future__ import annotations

import re
import shlex

from tests.support.documents import README, Block, blocks
from tests.support.in_process_command import run_command
from tests.support.model_copies import made_up
from tests.support.peer_box import MakePeerBox, PeerBox
from tests.support.process_box import wait_until

PAGE = "docs/friends.md"
# What the second person types; the first, who invites, types all else.
SECOND = ("pinaivu peers join", "pinaivu peers leave")
MODEL = "tiny:latest"


def commands_of(page: str, section: str = "") -> list[str]:
    """The lines of its blocks; all of them are commands of `pinaivu`."""
    found: list[Block] = [
        block for block in blocks(page) if block.is_for_shell and section in ("", block.section)
    ]
    lines = [line for block in found for line in block.text.splitlines() if line]
    assert all(line.startswith("pinaivu ") for line in lines)
    return lines


def follow(lines: list[str], first: PeerBox, second: PeerBox) -> dict[str, str]:
    """Run the commands, each on the home of whoever types it; what each prints."""
    printed: dict[str, str] = {}
    ticket = ""
    for line in lines:
        home = (second if line.startswith(SECOND) else first).home
        text = line.replace("pnv1...", ticket).replace("MODEL", MODEL)
        _, *args = shlex.split(text, comments=True)
        printed[line] = run_command(*args, home=home, input="y\n").stdout  # leaving asks
        if "invite" in line:
            found = re.search(r"pnv1\w+", printed[line])
            assert found
            ticket = found[0]
        if "join" in line:
            wait_until(lambda: first.sees("kitchen"), "the boxes are connected")
    return printed


def test_the_page_is_followed_by_two_people(member: MakePeerBox) -> None:
    first, second = member("attic"), member("kitchen")
    (second.home / "models").mkdir()
    (second.home / "models" / "tiny.gguf").write_bytes(made_up(1))
    first.start(), second.start()
    printed = follow(commands_of(PAGE), first, second)
    assert "kitchen" in printed["pinaivu peers ls"]
    assert "connected" in printed["pinaivu peers ls"]
    assert list((first.home / "models").glob("tiny*.gguf"))
    assert first.listed()["kitchen"]["state"] == "revoked"


def test_the_section_of_the_readme_is_followed_by_two_people(member: MakePeerBox) -> None:
    first, second = member("attic").start(), member("kitchen").start()
    lines = commands_of(README, "Join a friend's box")
    printed = follow(lines, first, second)
    assert "connected" in printed["pinaivu peers ls"]
