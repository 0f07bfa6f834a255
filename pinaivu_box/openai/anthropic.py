"""Wire types of `/v1/messages` (Anthropic's API), and its messages as those of a chat."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from pinaivu_box.engine.messages import TopK, TopP
from pinaivu_box.errors import InvalidBody
from pinaivu_box.openai import parameters
from pinaivu_box.openai.fields import IgnoredFields
from pinaivu_box.openai.types import (
    MAX_STOP_STRINGS,
    MAX_TOOLS,
    FunctionName,
    Identifier,
    KeepAlive,
    Schema,
    StopString,
    Text,
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
    content: str | list[TextBlock | DocumentBlock | SearchResultBlock] | None = None
    is_error: bool | None = None


Readable = TextBlock | DocumentBlock | SearchResultBlock
Block = Readable | ThinkingBlock | ToolUseBlock | ToolResultBlock


class AnthropicMessage(Struct, frozen=True):
    role: Literal["user", "assistant", "system"]
    content: str | list[Block]


class AnthropicTool(Struct, frozen=True):
    name: FunctionName
    input_schema: Schema
    description: str | None = None
    type: Literal["custom"] | None = None


class AnthropicChoice(Struct, frozen=True, forbid_unknown_fields=True):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool = False


class Thinking(Struct, frozen=True):
    type: Literal["enabled", "disabled", "adaptive"]


class Owner(Struct, frozen=True):
    user_id: Identifier | None = None


class CountTokensRequest(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Body of `POST /v1/messages/count_tokens`."""

    model: Text
    messages: Annotated[list[AnthropicMessage], Meta(min_length=1)]
    system: str | list[TextBlock] | None = None
    tools: Annotated[list[AnthropicTool], Meta(max_length=MAX_TOOLS)] | None = None
    tool_choice: AnthropicChoice | None = None
    thinking: Thinking | None = None

    @staticmethod
    def prepare(raw: dict[str, Any], ignored: IgnoredFields) -> None:
        parameters.messages(raw, ignored)


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

    @staticmethod
    def prepare(raw: dict[str, Any], ignored: IgnoredFields) -> None:
        parameters.keep_alive(raw, ignored)
        parameters.messages(raw, ignored)


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
        if message.role == "assistant":
            answered = True
            messages.append(_assistant(blocks, number))
        elif message.role == "user":
            messages += _user(blocks, number)
        elif answered:
            text = f"<system>\n{_system(blocks, number)}\n</system>"
            if messages[-1]["role"] == "user":
                messages[-1]["content"] += f"\n\n{text}"
            else:
                messages.append({"role": "user", "content": text})
        else:
            system.append(_system(blocks, number))
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


def _assistant(blocks: list[Block], number: int) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": ""}
    texts: list[str] = []
    for block in blocks:
        match block:
            case ThinkingBlock(thinking):
                message["reasoning_content"] = message.get("reasoning_content", "") + thinking
            case ToolUseBlock(call_id, name, arguments):
                function = {"name": name, "arguments": parameters.text_of_arguments(arguments)}
                call = {"id": call_id, "type": "function", "function": function}
                message.setdefault("tool_calls", []).append(call)
            case ToolResultBlock():
                raise _misplaced("a tool_result must be in a message of the user", number)
            case _:
                texts.append(_readable(block))
    message["content"] = "".join(texts)
    return message


def _user(blocks: list[Block], number: int) -> list[dict[str, Any]]:
    results: list[dict[str, Any]] = []
    texts: list[str] = []
    for block in blocks:
        match block:
            case ToolResultBlock(call_id, content, is_error):
                text = _text(content or "")
                if is_error:  # templates have no field for it
                    text = f"Error: {text}" if text else "Error"
                results.append({"role": "tool", "tool_call_id": call_id, "content": text})
            case ToolUseBlock() | ThinkingBlock():
                raise _misplaced(
                    "tool_use and thinking must be in a message of the assistant", number
                )
            case _:
                texts.append(_readable(block))
    text = "".join(texts)
    return [*results, {"role": "user", "content": text}] if text or not results else results


def _system(blocks: list[Block], number: int) -> str:
    """The text of a system message."""
    texts = []
    for block in blocks:
        if isinstance(block, ToolUseBlock | ThinkingBlock | ToolResultBlock):
            raise _misplaced("a system message must consist of text", number)
        texts.append(_readable(block))
    return "".join(texts)


def _misplaced(message: str, number: int) -> InvalidBody:
    return InvalidBody(message, loc=("body", "messages", number, "content"))


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
