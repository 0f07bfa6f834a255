"""A conversation as Markdown: to read, to edit by hand, and to import again.

    # Title

    Model: llama3.2:3b

    Memories: off

    > The system prompt, if there is one.

    ## You · 2026-11-30T19:46:18.123Z

    **File notes.txt**

    ```
    what is in it
    ```

    (image 1)

    The message.

    ## llama3.2:3b · 2026-11-30T19:46:20.456Z

    The answer.

    *stopped*

A line of a message that would be read as one of the format's own has a backslash before it.  There
is one branch, and neither images nor thoughts, tokens, receipts and errors: JSON has all of them.
Blank lines around a message are not kept.

What is read may have been written by hand: `## You`, `## User` and `## Assistant` need no time, and
the lines above the first message may be missing.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Any

import msgspec

from pinaivu_box.errors import InvalidBody
from pinaivu_box.openai.conversations import (
    MAX_FILES,
    MAX_TITLE,
    Conversation,
    Message,
    Portable,
    PortableConversation,
    TextFile,
)
from pinaivu_box.openai.decoding import from_validation
from pinaivu_box.text import END, utc_text

_LINE_END = r"[ \t]{0,8}(?![^\n])"
_TIME = (
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}[T ][0-9]{2}:[0-9]{2}(?::[0-9]{2}(?:[.][0-9]{1,6})?)?"
    r"(?:Z|[+-][0-9]{2}:[0-9]{2})?"
)
_BETWEEN = r"[ \t]{1,4}·[ \t]{1,4}"
# No number in these is without a limit that a long line could make slow.
_HEADING = (
    r"##[ \t]{1,4}(?:(?P<who>(?i:you|user|me|assistant))"
    rf"|(?P<model>[^\n]{{1,600}}?)(?={_BETWEEN}{_TIME}{_LINE_END}))"
    rf"(?:{_BETWEEN}(?P<time>{_TIME}))?{_LINE_END}"
)
_FILE = rf"\*\*File (?P<name>[^\n]{{1,300}})\*\*{_LINE_END}"
_STATUS = rf"\*(?P<status>stopped|failed|interrupted|running)\*{_LINE_END}"
_OWN = re.sub(r"\?P<[a-z]+>", "?:", f"(?:{_HEADING}|{_FILE}|{_STATUS})")
_HEADINGS = re.compile(f"^{_HEADING}", re.MULTILINE)
_ATTACHED = re.compile(rf"\n*{_FILE}\n+(?P<fence>`{{3,}})[^`\n]{{0,100}}\n")
_ENDS_WITH_STATUS = re.compile(rf"(?:\n|^){_STATUS}{END}")
_TO_ESCAPE = re.compile(rf"^(?=\\*{_OWN})", re.MULTILINE)
_ESCAPED = re.compile(rf"^\\(?=\\*{_OWN})", re.MULTILINE)
_TITLE = re.compile(r"^#[ \t]{1,4}(?P<title>[^\n]+)", re.MULTILINE)
_MODEL = re.compile(r"^Model:[ \t]{1,4}(?P<model>[^\n]+)", re.MULTILINE)
_NO_MEMORIES = re.compile(rf"^Memories:[ \t]{{1,4}}off{_LINE_END}", re.MULTILINE)
_QUOTED = re.compile(r"^> ?(?P<line>[^\n]*)", re.MULTILINE)
_USER = ("you", "user", "me")
_NAMES = (*_USER, "assistant")  # which no model's name is read as


# -- writing ---------------------------------------------------------------------------------------


def written(conversation: Conversation, messages: list[Message]) -> str:
    """`messages`: those of the branch that is shown."""
    parts = [f"# {_on_a_line(conversation.title) or 'Conversation'}"]
    if model := _on_a_line(conversation.model):
        parts.append(f"Model: {model}")
    if not conversation.memory:
        parts.append("Memories: off")
    if conversation.system:
        lines = conversation.system.split("\n")
        parts.append("\n".join(f"> {line}" if line else ">" for line in lines))
    for message in messages:
        parts.append(f"## {_author(message)} · {utc_text(message.created_at / 1000)}")
        parts += [_attached(file) for file in message.files]
        parts += [f"(image {number})" for number, _ in enumerate(message.images, 1)]
        parts.append(_escaped(message.content.strip("\n")))
        if message.status != "complete":
            parts.append(f"*{message.status}*")
    return "\n\n".join(part for part in parts if part) + "\n"


def fence_around(text: str) -> str:
    """The shortest fence of Markdown that nothing in a text ends."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    return "`" * max(3, longest + 1)


def _author(message: Message) -> str:
    if message.role == "user":
        return "You"
    name = _on_a_line(message.model)
    return "Assistant" if not name or name.casefold() in _NAMES else name


def _attached(file: TextFile) -> str:
    fence = fence_around(file.text)
    name = _on_a_line(file.name) or "file"
    return f"**File {name}**\n\n{fence}\n{_escaped(file.text)}\n{fence}"


def _escaped(text: str) -> str:
    return _TO_ESCAPE.sub(r"\\", text)


def _on_a_line(text: str) -> str:
    return " ".join(text.split())


# -- reading ---------------------------------------------------------------------------------------


def read(data: bytes) -> Portable:
    """One conversation.  Raises InvalidBody if there is no message in it, or too much."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidBody(f"the Markdown is not UTF-8: {error}") from error
    if text.count("\r\n") == text.count("\n"):
        text = text.replace("\r\n", "\n")
    headings = list(_HEADINGS.finditer(text))
    if not headings:
        raise InvalidBody(
            "there is no message in the Markdown: each begins with a line like '## You' or "
            "'## Assistant'"
        )
    ends = [heading.start() for heading in headings[1:]] + [len(text)]
    messages = [
        _message(number, heading, text[heading.end() : end].strip("\n"))
        for number, (heading, end) in enumerate(zip(headings, ends, strict=True))
    ]
    fields = _head(text[: headings[0].start()])
    fields["model"] = fields["model"] or next(
        (one["model"] for one in reversed(messages) if one.get("model")), ""
    )
    times = [one["created_at"] for one in messages]
    fields |= {"created_at": times[0], "updated_at": times[-1], "messages": messages}
    try:
        conversation = msgspec.convert(fields, PortableConversation)
    except msgspec.ValidationError as error:
        raise from_validation(error) from error
    return Portable("pinaivu-chats", 1, [conversation])


def _head(text: str) -> dict[str, Any]:
    """What is said above the first message; other text there is passed over."""
    title, model = _TITLE.search(text), _MODEL.search(text)
    return {
        "title": title["title"].strip()[:MAX_TITLE] if title else "",
        "model": model["model"].strip() if model else "",
        "memory": _NO_MEMORIES.search(text) is None,
        "system": "\n".join(quoted["line"] for quoted in _QUOTED.finditer(text)),
    }


def _message(number: int, heading: re.Match[str], text: str) -> dict[str, Any]:
    who = (heading["who"] or "").casefold()
    fields: dict[str, Any] = {
        "id": str(number),
        "parent": str(number - 1) if number else None,
        "role": "user" if who in _USER else "assistant",
        "created_at": _milliseconds(heading["time"]),
        "model": (heading["model"] or "").strip(),
    }
    fields["files"], text = _files_of(text)
    if fields["role"] == "assistant" and (status := _ENDS_WITH_STATUS.search(text)) is not None:
        fields["status"], text = status["status"], text[: status.start()].rstrip("\n")
    fields["content"] = _unescaped(text)
    return fields


def _files_of(text: str) -> tuple[list[dict[str, str]], str]:
    """The files at the beginning of a message, and the rest."""
    files: list[dict[str, str]] = []
    while len(files) < MAX_FILES and (attached := _ATTACHED.match(text)) is not None:
        begin = attached.end()
        end = _end_of_fence(text, begin - 1, attached["fence"])
        if end is None:
            break
        name = attached["name"].strip()[:255] or "file"
        files.append({"name": name, "text": _unescaped(text[begin:end])})
        text = text[end + 1 + len(attached["fence"]) :].lstrip(" \t")
    return files, text.strip("\n") if files else text


def _unescaped(text: str) -> str:
    return _ESCAPED.sub("", text)


def _end_of_fence(text: str, begin: int, fence: str) -> int | None:
    """Where the line break before the closing fence is."""
    end = text.find(f"\n{fence}", begin)
    while end >= 0:
        after = end + 1 + len(fence)
        if after == len(text) or text[after] in "\n \t":
            return end
        end = text.find(f"\n{fence}", end + 1)
    return None


def _milliseconds(time: str | None) -> int:
    """0 if it is none."""
    try:
        moment = datetime.fromisoformat(time or "")
        moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
        return max(0, round(moment.timestamp() * 1000))
    except (ValueError, OverflowError):
        return 0
