"""Wire types of `/v1/messages` (Anthropic's API), and its messages as those of a chat."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from pinaivu_box.engine.messages import TopK, TopP
from pinaivu_box.errors import InvalidBody
from pinaivu_box.openai import parameters
from pinaivu_box.openai.images import Part, content_of, data_url, image_part, parts_of
from pinaivu_box.openai.tools import function_call
from pinaivu_box.openai.types import (
    MAX_STOP_STRINGS,
    MAX_TOOLS,
    FunctionName,
    Identifier,
    KeepAlive,
    ModelRequest,
    Schema,
    StopString,
    Strict,
    TokenCount,
)


class TextBlock(Struct, frozen=True, tag="text", tag_field="type"):
    text: str


class TextSource(Struct, frozen=True, tag="text", tag_field="type"):
    data: str
    media_type: str = "text/plain"


class ContentSource(Struct, frozen=True, tag="content", tag_field="type"):
    content: str | list[TextBlock]


class DocumentBlock(Struct, frozen=True, tag="document", tag_field="type"):
    """A document of text."""

    source: TextSource | ContentSource
    title: str | None = None
    context: str | None = None


class SearchResultBlock(Struct, frozen=True, tag="search_result", tag_field="type"):
    source: str
    title: str
    content: list[TextBlock]


class Base64Source(Struct, frozen=True, tag="base64", tag_field="type"):
    data: str
    media_type: str = ""


class UrlSource(Struct, frozen=True, tag="url", tag_field="type"):
    url: str


class ImageBlock(Struct, frozen=True, tag="image", tag_field="type"):
    source: Base64Source | UrlSource


class ThinkingBlock(Struct, frozen=True, tag="thinking", tag_field="type"):
    thinking: str
    signature: str | None = None


class ToolUseBlock(Struct, frozen=True, tag="tool_use", tag_field="type"):
    """`input` is text where a model has not written an object."""

    id: str
    name: str
    input: dict[str, Any] | str


class ToolResultBlock(Struct, frozen=True, tag="tool_result", tag_field="type"):
    tool_use_id: str
    content: str | list[TextBlock | DocumentBlock | SearchResultBlock | ImageBlock] | None = None
    is_error: bool | None = None


Readable = TextBlock | DocumentBlock | SearchResultBlock
Visible = Readable | ImageBlock
Block = Visible | ThinkingBlock | ToolUseBlock | ToolResultBlock
# Which of them a message may contain, by its role.
_BLOCKS = {
    "assistant": Readable | ThinkingBlock | ToolUseBlock,
    "user": Visible | ToolResultBlock,
    "system": Readable,
}


class AnthropicMessage(Struct, frozen=True):
    role: Literal["user", "assistant", "system"]
    content: str | list[Block]


class AnthropicTool(Struct, frozen=True):
    name: FunctionName
    input_schema: Schema
    description: str | None = None
    type: Literal["custom"] | None = None


class AnthropicChoice(Strict, frozen=True):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool = False


class Thinking(Struct, frozen=True):
    type: Literal["enabled", "disabled", "adaptive"]


class Owner(Struct, frozen=True):
    user_id: Identifier | None = None


class CountTokensRequest(ModelRequest, frozen=True, kw_only=True):
    """Body of `POST /v1/messages/count_tokens`."""

    messages: Annotated[list[AnthropicMessage], Meta(min_length=1)]
    system: str | list[TextBlock] | None = None
    tools: Annotated[list[AnthropicTool], Meta(max_length=MAX_TOOLS)] | None = None
    tool_choice: AnthropicChoice | None = None
    thinking: Thinking | None = None
    prepare = staticmethod(parameters.counted_messages)


class MessagesRequest(CountTokensRequest, frozen=True, kw_only=True):
    """Body of `POST /v1/messages`."""

    max_tokens: TokenCount
    stream: bool = False
    stop_sequences: Annotated[list[StopString], Meta(max_length=MAX_STOP_STRINGS)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=1)] | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    metadata: Owner | None = None
    service_tier: Literal["auto", "standard_only"] | None = None
    keep_alive: KeepAlive | None = None
    prepare = staticmethod(parameters.messages)


class AnthropicUsage(Struct, frozen=True):
    """`input_tokens` are the prompt's tokens that were not in the cache."""

    input_tokens: int
    output_tokens: int
    cache_read_input_tokens: int = 0
    cache_creation_input_tokens: int = 0


class AnthropicAnswer(Struct, frozen=True):
    id: str
    request_id: str
    model: str
    content: list[dict[str, Any]]
    stop_reason: str | None
    stop_sequence: str | None
    usage: AnthropicUsage
    type: str = "message"
    role: str = "assistant"
    ignored_parameters: list[str] | UnsetType = UNSET


class TokenCountAnswer(Struct, frozen=True):
    request_id: str
    input_tokens: int
    ignored_parameters: list[str] | UnsetType = UNSET


# -- as messages of a chat ----------------------------------------------------------------------


def as_messages(body: CountTokensRequest) -> list[dict[str, Any]]:
    """The messages of a chat.  Raises InvalidBody for misplaced blocks.

    Templates accept a system message at the beginning only: those before the first answer are
    joined there, and later ones are put into a message of the user.
    """
    system = [_text(body.system)] if body.system else []
    messages: list[dict[str, Any]] = []
    answered = False
    for number, message in enumerate(body.messages):
        blocks: list[Block] = (
            [TextBlock(message.content)] if isinstance(message.content, str) else message.content
        )
        _check_places(blocks, message.role, number)
        text = _text([block for block in blocks if isinstance(block, Readable)])
        if message.role == "assistant":
            answered = True
            messages.append({"role": "assistant", "content": text, **_answer(blocks)})
        elif message.role == "user":
            at = ("messages", number, "content")
            results = [
                _result(block, *at, place)
                for place, block in enumerate(blocks)
                if isinstance(block, ToolResultBlock)
            ]
            messages += results
            content = _seen(blocks, *at)
            if content or not results:
                messages.append({"role": "user", "content": content})
        elif answered:
            text = f"<system>\n{text}\n</system>"
            if messages[-1]["role"] == "user":
                before = parts_of(messages[-1]["content"])
                messages[-1]["content"] = content_of([*before, f"\n\n{text}"])
            else:
                messages.append({"role": "user", "content": text})
        else:
            system.append(text)
    if system:
        messages.insert(0, {"role": "system", "content": "\n\n".join(system)})
    if continues(body):  # models continue badly after white space, and Anthropic refuses it
        messages[-1]["content"] = messages[-1]["content"].rstrip()
    return messages


def continues(body: CountTokensRequest) -> bool:
    """Whether the answer continues the last message, which the client has begun."""
    last = body.messages[-1]
    if last.role != "assistant":
        return False
    return isinstance(last.content, str) or all(
        isinstance(block, TextBlock) for block in last.content
    )


def _check_places(blocks: list[Block], role: str, number: int) -> None:
    """Raises InvalidBody for a block that messages of this role do not have."""
    for block in blocks:
        if not isinstance(block, _BLOCKS[role]):
            kind = block.__struct_config__.tag
            raise InvalidBody(
                f"a {kind} block may not be in a message of the {role}",
                loc=("body", "messages", number, "content"),
            )


def _answer(blocks: list[Block]) -> dict[str, Any]:
    """The reasoning and the calls of the assistant's message."""
    thoughts = [block.thinking for block in blocks if isinstance(block, ThinkingBlock)]
    calls = [
        function_call(block.id, block.name, parameters.text_of_arguments(block.input))
        for block in blocks
        if isinstance(block, ToolUseBlock)
    ]
    return {
        **({"reasoning_content": "".join(thoughts)} if thoughts else {}),
        **({"tool_calls": calls} if calls else {}),
    }


def _result(block: ToolResultBlock, *at: str | int) -> dict[str, Any]:
    blocks = block.content or ""
    content = blocks if isinstance(blocks, str) else _seen(blocks, *at, "content")
    if block.is_error:  # templates have no field for it
        content = content_of(["Error: ", *parts_of(content)]) if content else "Error"
    return {"role": "tool", "tool_call_id": block.tool_use_id, "content": content}


def _seen(blocks: Sequence[Block], *at: str | int) -> str | list[dict[str, Any]]:
    """The content of a message from its texts and images."""
    parts = [
        _image(block, *at, place) if isinstance(block, ImageBlock) else _readable(block)
        for place, block in enumerate(blocks)
        if isinstance(block, Visible)
    ]
    return content_of(parts)


def _image(block: ImageBlock, *at: str | int) -> Part:
    match block.source:
        case Base64Source(data):
            return image_part(data_url(data), *at, "source", "data")
        case UrlSource(url):
            return image_part(url, *at, "source", "url")


def _text(content: str | Sequence[Readable]) -> str:
    return content if isinstance(content, str) else "".join(map(_readable, content))


def _readable(block: Readable) -> str:
    match block:
        case TextBlock(text):
            return text
        case SearchResultBlock(source, title, content):
            return f"{title}\n{source}\n{_text(content)}\n"
        case DocumentBlock(source=source):
            text = source.data if isinstance(source, TextSource) else _text(source.content)
            return "\n".join(filter(None, (block.title, block.context, text))) + "\n"
