"""Wire types of `/v1/messages`: Anthropic's shape, which coding agents speak."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from pinaivu_box.errors import InvalidBody
from pinaivu_box.openai.types import (
    FunctionName,
    Identifier,
    Probability,
    Schema,
    StopString,
    Text,
    TokenCount,
    TopK,
)


class TextBlock(Struct, frozen=True, tag="text", tag_field="type"):
    """More fields, such as `cache_control`, are hints: prefixes are cached anyway."""

    text: str


class ThinkingBlock(Struct, frozen=True, tag="thinking", tag_field="type"):
    thinking: str
    signature: str = ""


class ToolUseBlock(Struct, frozen=True, tag="tool_use", tag_field="type"):
    id: str
    name: FunctionName
    input: dict[str, Any]


class ToolResultBlock(Struct, frozen=True, tag="tool_result", tag_field="type"):
    tool_use_id: str
    content: str | list[TextBlock] = ""
    is_error: bool = False


Block = TextBlock | ThinkingBlock | ToolUseBlock | ToolResultBlock


class AnthropicMessage(Struct, frozen=True):
    role: Literal["user", "assistant"]
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
    budget_tokens: int | None = None


class Owner(Struct, frozen=True):
    user_id: Identifier | None = None


class CountTokensRequest(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Body of `POST /v1/messages/count_tokens`."""

    model: Text
    messages: Annotated[list[AnthropicMessage], Meta(min_length=1)]
    system: str | list[TextBlock] | None = None
    tools: Annotated[list[AnthropicTool], Meta(max_length=128)] | None = None
    tool_choice: AnthropicChoice | None = None
    thinking: Thinking | None = None


class MessagesRequest(CountTokensRequest, frozen=True, kw_only=True):
    """Body of `POST /v1/messages`."""

    max_tokens: TokenCount
    stream: bool = False
    stop_sequences: Annotated[list[StopString], Meta(max_length=16)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=1)] | None = None
    top_p: Probability | None = None
    top_k: TopK | None = None
    metadata: Owner | None = None
    service_tier: Literal["auto", "standard_only"] | None = None


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
    """Raises InvalidBody for blocks where they cannot be."""
    made: list[dict[str, Any]] = []
    if body.system:
        made.append({"role": "system", "content": _text(body.system)})
    for number, message in enumerate(body.messages):
        blocks = message.content
        if isinstance(blocks, str):
            made.append({"role": message.role, "content": blocks})
        elif message.role == "assistant":
            made.append(_assistant(blocks, number))
        else:
            made += _user(blocks, number)
    return made


def _assistant(blocks: list[Block], number: int) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": ""}
    texts: list[str] = []
    for block in blocks:
        match block:
            case TextBlock(text):
                texts.append(text)
            case ThinkingBlock(thinking):
                message["reasoning_content"] = thinking
            case ToolUseBlock(call_id, name, given):
                arguments = json.dumps(given, ensure_ascii=False)
                function = {"name": name, "arguments": arguments}
                call = {"id": call_id, "type": "function", "function": function}
                message.setdefault("tool_calls", []).append(call)
            case ToolResultBlock():
                raise _misplaced("a tool_result belongs into a user's message", number)
    message["content"] = "".join(texts)
    return message


def _user(blocks: list[Block], number: int) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = []
    texts: list[str] = []
    for block in blocks:
        match block:
            case TextBlock(more):
                texts.append(more)
            case ToolResultBlock(call_id, content):
                made.append({"role": "tool", "tool_call_id": call_id, "content": _text(content)})
            case _:
                raise _misplaced("tool_use and thinking belong into an assistant's", number)
    text = "".join(texts)
    return [*made, {"role": "user", "content": text}] if text or not made else made


def _misplaced(why: str, number: int) -> InvalidBody:
    return InvalidBody(why, loc=("body", "messages", number, "content"))


def _text(content: str | list[TextBlock]) -> str:
    return content if isinstance(content, str) else "".join(block.text for block in content)
