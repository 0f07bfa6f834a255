"""Checks chats and prompts beyond what their types say, and brings them into one form."""

from __future__ import annotations

from typing import Any, cast

from pinaivu_box.errors import InvalidBody, quoted
from pinaivu_box.openai.images import Part, content_of, image_part
from pinaivu_box.openai.tools import chosen_tools, custom_arguments, function_call, functions
from pinaivu_box.openai.types import (
    AssistantMessage,
    ChatRequest,
    Content,
    CustomToolCall,
    ImagePart,
    JsonFormat,
    Message,
    RefusalPart,
    Sampled,
    SchemaFormat,
    StopStrings,
    TextOrTokens,
    TextPart,
    ToolCall,
    ToolMessage,
    UserMessage,
)


def text_of(content: Content | list[TextPart | RefusalPart] | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part.text if isinstance(part, TextPart) else part.refusal for part in content)


def texts_or_tokens(value: TextOrTokens, param: str, max_entries: int) -> list[str | list[int]]:
    """As a list of texts, or of lists of tokens.  Raises InvalidBody."""
    if isinstance(value, list) and value and all(isinstance(item, int) for item in value):
        value = [cast("list[int]", value)]
    items = [value] if isinstance(value, str) else value
    kinds = {type(item) for item in items}
    if len(kinds) > 1 or int in kinds:
        raise InvalidBody("texts and tokens are mixed", loc=("body", param), kind="type_error")
    if not items or not all(items):
        raise InvalidBody(f"{param} is empty", loc=("body", param))
    if len(items) > max_entries:
        raise InvalidBody(f"{param} has more than {max_entries} entries", loc=("body", param))
    return cast("list[str | list[int]]", items)


def stop_strings(stop: StopStrings | None) -> list[str]:
    return [stop] if isinstance(stop, str) else list(stop or [])


def normalise(messages: list[Message]) -> list[dict[str, Any]]:
    """Messages in the form that the engine reads and the receipt covers, once the files of their
    images are here (see `images`)."""
    return [_message(message, number) for number, message in enumerate(messages)]


def _message(message: Message, number: int) -> dict[str, Any]:
    normal: dict[str, Any] = {
        "role": message.__struct_config__.tag,
        "content": _content(message, number),
    }
    if message.name is not None:
        normal["name"] = message.name
    if isinstance(message, ToolMessage):
        normal["tool_call_id"] = message.tool_call_id
    if isinstance(message, AssistantMessage):
        if message.tool_calls:
            normal["tool_calls"] = [_call(call) for call in message.tool_calls]
        if message.refusal and not normal["content"]:
            normal["content"] = message.refusal
        if message.reasoning_content is not None:
            normal["reasoning_content"] = message.reasoning_content
    return normal


def _content(message: Message, number: int) -> str | list[dict[str, Any]]:
    if not isinstance(message, UserMessage | ToolMessage) or isinstance(message.content, str):
        return text_of(cast("Content", message.content))
    at = ("messages", number, "content")
    return content_of([_part(part, *at, place) for place, part in enumerate(message.content)])


def _part(part: TextPart | ImagePart, *at: str | int) -> Part:
    if isinstance(part, TextPart):
        return part.text
    url = part.image_url
    return image_part(url if isinstance(url, str) else url.url, *at, "image_url")


def _call(call: ToolCall | CustomToolCall) -> dict[str, Any]:
    if isinstance(call, ToolCall):
        return function_call(call.id, call.function.name, call.function.arguments)
    return function_call(call.id, call.custom.name, custom_arguments(call.custom.input))


def check_stream(body: Sampled) -> None:
    """Raises InvalidBody."""
    if body.stream_options is not None and not body.stream:
        raise _needs("stream_options", "stream to be true")


def check_length(body: Sampled, max_tokens: int | None) -> None:
    """Raises InvalidBody if `min_tokens` is above `max_tokens`."""
    if max_tokens is not None and (body.min_tokens or 0) > max_tokens:
        raise InvalidBody(
            f"min_tokens is {body.min_tokens} and max_tokens {max_tokens}: lower the first or "
            "raise the second",
            loc=("body", "min_tokens"),
        )


def max_tokens(body: ChatRequest) -> int | None:
    """The lower of the two limits."""
    limits = (body.max_tokens, body.max_completion_tokens)
    return min((limit for limit in limits if limit is not None), default=None)


def check_chat(body: ChatRequest) -> None:
    """Check fields that depend on each other.  Raises InvalidBody."""
    check_stream(body)
    check_length(body, max_tokens(body))
    _check_ending(body)
    if body.top_logprobs is not None and not body.logprobs:
        raise _needs("top_logprobs", "logprobs to be true")
    tools = functions(body.tools or ())
    names = {tool.name for tool in tools}
    if len(names) < len(tools):
        raise InvalidBody("two tools have the same name", loc=("body", "tools"))
    choice, allowed = chosen_tools(body.tool_choice)
    if choice not in ("none", "auto") and not (names if allowed is None else allowed and names):
        raise _needs("tool_choice", "tools to choose from")
    for name in allowed or ():
        if name not in names:
            raise InvalidBody(f"there is no tool '{quoted(name)}'", loc=("body", "tool_choice"))
    if body.grammar and isinstance(body.response_format, JsonFormat | SchemaFormat):
        raise _excludes("grammar", "response_format")
    if body.grammar and names and body.tool_choice != "none":
        raise _excludes("grammar", "tools")


def _check_ending(body: ChatRequest) -> None:
    if not body.continue_final_message:
        return
    if body.add_generation_prompt:
        raise _excludes("continue_final_message", "add_generation_prompt")
    last = body.messages[-1]
    if not isinstance(last, AssistantMessage) or last.tool_calls:
        raise _needs("continue_final_message", "a last message of the assistant without tool calls")


def _needs(name: str, condition: str) -> InvalidBody:
    return InvalidBody(f"{name} needs {condition}", loc=("body", name))


def _excludes(name: str, other: str) -> InvalidBody:
    return InvalidBody(f"{name} and {other} exclude each other", loc=("body", name))
