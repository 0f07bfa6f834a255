"""Chats in Markdown: what is written is read again, also after it was edited by hand."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import msgspec
import pytest
from hypothesis import example, given

from pinaivu_box.errors import InvalidBody
from pinaivu_box.openai.chat_markdown import fence_around, read, written
from pinaivu_box.openai.conversations import (
    Conversation,
    Message,
    PortableConversation,
    PortableMessage,
    TextFile,
)

AT = 1_790_000_000_123
MARKS = (
    "## You", "## You · 2026-11-30T19:46:18.123Z", "## m:1 · 2026-11-30T19:46:18Z", "## Assistant",
    "**File a.txt**", "*stopped*", "(image 1)", "# Title", "Model: x", "> quoted", "```", "````",
)  # fmt: skip
LINES = st.one_of(
    st.sampled_from(MARKS),
    st.builds("{}{}".format, st.sampled_from(("\\", "\\\\", " ", "## ")), st.sampled_from(MARKS)),
    st.text(st.characters(codec="utf-8"), max_size=20),
)
TEXTS = st.lists(LINES, max_size=6).map("\n".join)
NAMES = st.sampled_from(("notes.txt", "a**b** c", "File x", "## You", "```"))


def conversation(messages: list[Message], **more: Any) -> tuple[Conversation, list[Message]]:
    leaf = messages[-1].id if messages else None
    fields = {"title": "A title", "model": "m:1", "system": "", "memory": True, **more}
    made = Conversation(id="c", leaf=leaf, created_at=AT, updated_at=AT, **fields)
    return made, messages


def message(role: Any, content: str, number: int = 0, **more: Any) -> Message:
    return Message(
        id=f"m{number}", parent=None, role=role, created_at=AT + number, content=content, **more
    )


def taken(*written_from: Any) -> PortableConversation:
    (found,) = read(written(*written_from).encode()).conversations
    return found


@given(TEXTS, TEXTS, TEXTS, NAMES, st.sampled_from(("complete", "stopped", "failed")))
@example("## You", "*stopped*", "## Assistant · 2026-11-30T19:46:18Z", "```", "stopped")
def test_what_is_written_is_read_again(
    system: str, question: str, text: str, name: str, status: Any
) -> None:
    files = [TextFile(name, text), TextFile("second", "")]
    messages = [
        message("user", question, files=files),
        message("assistant", text, 1, model="llama3.2:3b", status=status),
        message("assistant", question, 2),
        message("user", text, 3),
    ]
    found = taken(*conversation(messages, system=system, memory=False))
    assert (found.title, found.model, found.memory) == ("A title", "m:1", False)
    assert found.system == system
    kept = ("role", "created_at", "model", "status", "files")
    for one, before in zip(found.messages, messages, strict=True):
        assert one.content == before.content.strip("\n")
        assert [getattr(one, field) for field in kept] == [getattr(before, field) for field in kept]
    assert [one.parent for one in found.messages] == [None, "0", "1", "2"]
    assert (found.created_at, found.updated_at) == (AT, AT + 3)


@given(st.binary(max_size=300) | TEXTS.map(str.encode))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    try:
        (found,) = read(data).conversations
    except InvalidBody:
        return
    fields = msgspec.to_builtins(found)
    assert msgspec.convert(fields, PortableConversation) == found  # within all limits
    assert all(isinstance(one, PortableMessage) for one in found.messages)


def test_a_file_that_was_edited_by_hand_is_read() -> None:
    text = (
        "\ufeffSome words of mine.\r\n# Tea\r\n\r\n> Be brief.\r\n> Be kind.\r\n\r\n## you\r\nHow"
        " hot?\r\n\r\n## Assistant\r\n## Temperature\r\n\r\n80 °C\r\n"
        "##  User  ·  2026-11-30 19:46\r\nThanks"
    )
    (found,) = read(text.encode()).conversations
    assert (found.title, found.system) == ("Tea", "Be brief.\nBe kind.")
    assert [(one.role, one.content) for one in found.messages] == [
        ("user", "How hot?"),
        ("assistant", "## Temperature\n\n80 °C"),
        ("user", "Thanks"),
    ]


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "no message"),
        (b"# A page\n\n## Chapter\n", "no message"),
        (b"## You\n\xff", "UTF-8"),
        (b"## You\n" + b"x" * 2_000_001, "2000000"),
        (b"> " + b"x" * 32_001 + b"\n\n## You\nHi", "32000"),
    ],
)
def test_what_is_no_chat_or_too_much_is_refused(data: bytes, why: str) -> None:
    with pytest.raises(InvalidBody, match=why):
        read(data)


def test_an_image_leaves_a_mark_and_a_title_no_lines() -> None:
    picture = "data:image/png;base64,AAAA"
    made = conversation([message("user", "Look", images=[picture])], title="a\n## You\nb" * 40)
    text = written(*made)
    assert "base64" not in text
    (found,) = read(text.encode()).conversations
    (one,) = found.messages
    assert one.content == "(image 1)\n\nLook" and len(found.title) == 200


def test_a_fence_is_longer_than_any_in_the_text() -> None:
    assert fence_around("") == fence_around("a ` b `` c") == "```"
    assert fence_around("```` and ```") == "`````"
    assert len(fence_around("`" * 1_000_000)) == 1_000_001  # at once
