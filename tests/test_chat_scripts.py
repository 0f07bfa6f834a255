"""The chat's modules without a page: hidden characters, the tree of messages, days of a list."""

from __future__ import annotations

from typing import Any

import pytest

from pinaivu_box.server.pages.visible import visible_in_prose
from tests.support.javascript import Scripts

VISIBLE = """
import { visible } from "./chat/visible.js";
const mark = ({ code, name }) => `<span class="invisible" title="${name}">${code}</span>`;
const shown = (part) => (typeof part === "string" ? part : mark(part));
const answer = (text) => visible(text).map(shown).join("");
"""
TREE = """
import { Tree } from "./chat/tree.js";
const answer = ([messages, leaf]) => {
  const tree = new Tree(messages, leaf);
  return [tree.path().map((one) => one.id), messages.map((one) => tree.siblings(one))];
};
"""
DAYS = """
import { dayOf } from "./chat/days.js";
const answer = ([at, now]) => dayOf(new Date(at).getTime(), new Date(now));
"""


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Scripts:
    return Scripts(tmp_path_factory.mktemp("scripts"))


def test_a_message_of_the_user_is_shown_as_one_of_the_model(scripts: Scripts) -> None:
    hidden = "\u202a\u202b\u202c\u202d\u202e\u2060\ufeff\u180e\0\x07\x1b\x7f\x85"
    kept = "\tna\u00efve \u05d0\u200f\u200d\u2066x\u2069\r\n \U0001f468\u200d\U0001f469"
    texts = ["", "plain", hidden, kept, f"a{hidden}b", *(f"{one}{one}z" for one in hidden)]
    assert scripts.ask(VISIBLE, texts) == [visible_in_prose(text) for text in texts]


def test_the_newest_branch_is_shown_unless_another_was_chosen(scripts: Scripts) -> None:
    def message(id: str, parent: str | None) -> dict[str, Any]:
        return {"id": id, "parent": parent}

    tree = [message("a", None), message("b", "a"), message("c", "a"), message("d", "c")]
    answers = scripts.ask(TREE, [(tree, None), (tree, "b"), (tree, "gone"), ([], None)])
    siblings = [["a"], ["b", "c"], ["b", "c"], ["d"]]
    assert answers == [
        [["a", "c", "d"], siblings],
        [["a", "b"], siblings],
        [["a", "c", "d"], siblings],
        [[], []],
    ]


def test_conversations_are_listed_by_the_days_of_the_reader(
    scripts: Scripts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TZ", "Pacific/Auckland")  # 13 hours before UTC
    now = "2030-01-15T12:00:00Z"  # there it is the 16th
    times = {
        "2030-01-15T11:00:00Z": "Today",
        "2030-01-15T10:59:59Z": "Yesterday",
        "2030-01-14T10:59:59Z": "Last 7 days",
        "2030-01-01T12:00:00Z": "Last 30 days",
    }
    assert scripts.ask(DAYS, [(at, now) for at in times]) == list(times.values())
