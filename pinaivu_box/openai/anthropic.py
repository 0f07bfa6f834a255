"""Wire types of `/v1/messages`: Anthropic's shape, which coding agents speak."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from pinaivu_box.errors import InvalidBody
from pinaivu_box.openai import parameters
from pinaivu_box.openai.fields import IgnoredFields
from pinaivu_box.openai.types import (
    MAX_STOP_STRINGS,
    MAX_TOOLS,
    FunctionName,
    Identifier,
    KeepAlive,
    Probability,
    Schema,
    StopString,
    Text,
    TokenCount,
    TopK,
)


class TextBlock(Struct, frozen=True, tag="text", tag_field="type"):
    text: str


class TextSource(Struct, frozen=True, tag="text", tag_field="type"):
    data: str
    media_type: str = "text/plain"


class ContentSource(Struct, frozen=True, tag="content", tag_field="type"):
    content: str | list[TextBlock]


class DocumentBlock(Struct, frozen=True, tag="document", tag_field="type"):
    """A document that is text."""

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
    """`input` is text where a model has written something else than an object."""

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
    top_p: Probability | None = None
    top_k: TopK | None = None
    metadata: Owner | None = None
    service_tier: Literal["auto", "standard_only"] | None = None
    keep_alive: KeepAlive | None = None

    @staticmethod
    def prepare(raw: dict[str, Any], ignored: IgnoredFields) -> None:
        parameters.keep_alive(raw, ignored)
        parameters.messages(raw, ignored)


class AnthropicUsage(Struct, frozen=True):
    """`input_tokens` are those that were not in the cache."""

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
    """Raises InvalidBody for blocks where they cannot be.

    Templates know a system message at the beginning only: what of it comes before the first answer
    is joined there, and what comes later stands in a user's words.
    """
    system = [_text(body.system)] if body.system else []
    made: list[dict[str, Any]] = []
    answered = False
    for number, message in enumerate(body.messages):
        blocks: list[Block] = (
            [TextBlock(message.content)] if isinstance(message.content, str) else message.content
        )
        if message.role == "assistant":
            answered = True
            made.append(_assistant(blocks, number))
        elif message.role == "user":
            made += _user(blocks, number)
        elif answered:
            said = f"<system>\n{_words(blocks, number)}\n</system>"
            if made[-1]["role"] == "user":
                made[-1]["content"] += f"\n\n{said}"
            else:
                made.append({"role": "user", "content": said})
        else:
            system.append(_words(blocks, number))
    if system:
        made.insert(0, {"role": "system", "content": "\n\n".join(system)})
    if continues(body):  # Anthropic takes no white space at its end, where models go on badly
        made[-1]["content"] = made[-1]["content"].rstrip()
    return made


def continues(body: CountTokensRequest) -> bool:
    """Whether the answer goes on with the last message, which the client has begun."""
    last = body.messages[-1]
    if last.role != "assistant":
        return False
    return isinstance(last.content, str) or all(isinstance(b, TextBlock) for b in last.content)


def _assistant(blocks: list[Block], number: int) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": ""}
    texts: list[str] = []
    for block in blocks:
        match block:
            case ThinkingBlock(thinking):
                message["reasoning_content"] = message.get("reasoning_content", "") + thinking
            case ToolUseBlock(call_id, name, given):
                function = {"name": name, "arguments": parameters.text_of_arguments(given)}
                call = {"id": call_id, "type": "function", "function": function}
                message.setdefault("tool_calls", []).append(call)
            case ToolResultBlock():
                raise _misplaced("a tool_result belongs into a user's message", number)
            case _:
                texts.append(_readable(block))
    message["content"] = "".join(texts)
    return message


def _user(blocks: list[Block], number: int) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = []
    texts: list[str] = []
    for block in blocks:
        match block:
            case ToolResultBlock(call_id, content, is_error):
                text = _text(content or "")
                if is_error:  # templates have no word for it
                    text = f"Error: {text}" if text else "Error"
                made.append({"role": "tool", "tool_call_id": call_id, "content": text})
            case ToolUseBlock() | ThinkingBlock():
                raise _misplaced("tool_use and thinking belong into an assistant's", number)
            case _:
                texts.append(_readable(block))
    text = "".join(texts)
    return [*made, {"role": "user", "content": text}] if text or not made else made


def _words(blocks: list[Block], number: int) -> str:
    """Of a system message."""
    texts = []
    for block in blocks:
        if isinstance(block, ToolUseBlock | ThinkingBlock | ToolResultBlock):
            raise _misplaced("a system message is of text", number)
        texts.append(_readable(block))
    return "".join(texts)


def _misplaced(why: str, number: int) -> InvalidBody:
    return InvalidBody(why, loc=("body", "messages", number, "content"))


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
            return "\n".join(one for one in (block.title, block.context, text) if one) + "\n"
