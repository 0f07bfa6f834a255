"""Names and values of other servers, converted to those of the wire types.

Each function prepares the raw body of one endpoint, before its type is applied: names of other
servers that mean something here are renamed, values are converted to what their senders mean, and
what has no meaning here is ignored and reported (see `fields.IgnoredFields`).  Values of an
unexpected type are left for the wire type to refuse.
"""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Iterable
from typing import Any

import msgspec

from pinaivu_box.chat_format import TEMPLATE_OWN
from pinaivu_box.errors import InvalidBody, UnsupportedParameter, quoted
from pinaivu_box.openai.fields import BILLING, IgnoredFields

Raw = dict[str, Any]

# Name of other servers -> name here.
_RENAMED = {
    "repetition_penalty": "repeat_penalty",
    "num_predict": "max_tokens",
    "n_predict": "max_tokens",
    "max_new_tokens": "max_tokens",
    "max_output_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "random_seed": "seed",
    "stop_sequences": "stop",
    "ttl": "keep_alive",
}
_UNLIMITED = -1
# Numbers of tokens.  No context holds more than the largest number, so larger ones mean the same.
_COUNTS = ("max_tokens", "max_completion_tokens", "max_output_tokens", "min_tokens")
_MAX_TOKEN_COUNT = 2**31 - 1
# top_p 0 asks for the likeliest token alone; in proofs it must be above 0.
_MIN_TOP_P = 1e-9
_SCHEMA_NAME = "answer"  # of a schema without a name
# These ask for another kind of answer than text: ignoring them would break the client.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {  # name -> values without effect
    "audio": (),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
}
# These name a state on another server: ignoring them would lose a conversation.
_UNSUPPORTED_IN_RESPONSES: dict[str, tuple[Any, ...]] = {"conversation": (), "prompt": ()}
_WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "moderation": (),
    "prompt_cache_retention": ("in_memory",),
    "verbosity": ("medium",),
    "web_search_options": (),
    "truncation": ("disabled",),
    "max_tool_calls": (),
    "best_of": (1,),
}
# vLLM's names of output constraints, and llama.cpp's `json_schema` -> kind.
_GUIDED = {
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
    "json_schema": "json",
}
_TIERS = ("auto", "default", "flex", "priority", "scale", "standard_only")
_REASONING_FIELDS = ("think", "thinking", "enable_thinking")
_EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh")
# Blocks that Anthropic's servers make, and that no model here can read.
_SERVER_BLOCKS = (
    "redacted_thinking", "server_tool_use", "web_search_tool_result", "web_fetch_tool_result",
    "code_execution_tool_result", "bash_code_execution_tool_result",
    "text_editor_code_execution_tool_result", "tool_search_tool_result", "mcp_tool_use",
    "mcp_tool_result", "container_upload", "compaction", "tool_reference",
)  # fmt: skip


def sampled(raw: Raw, ignored: IgnoredFields) -> None:
    """A chat or a completion."""
    for name in ("num_predict", "n_predict"):
        if _is(raw.get(name), -2):  # until the context is full
            raw[name] = _UNLIMITED
    for name, here in _RENAMED.items():
        _rename(raw, name, here, ignored)
    _refuse(raw, _UNSUPPORTED)
    _common(raw, ignored, stop="stop")


def chat(raw: Raw, ignored: IgnoredFields) -> None:
    sampled(raw, ignored)
    _tools(raw, ("function", "custom"), ignored)
    for name in ("store", "metadata"):  # chats are not stored here
        if _asks(raw, name, (False, {})):
            ignored.add(name)
    choice = raw.get("tool_choice")
    if isinstance(choice, dict) and isinstance(choice.get("allowed_tools"), dict):
        path = ("tool_choice", "allowed_tools")
        _tools(choice["allowed_tools"], ("function", "custom"), ignored, *path)
    for name in ("max_tokens", "max_completion_tokens"):
        _unlimited(raw, name)
    _guided(raw, ignored)
    response_format = raw.get("response_format")
    if isinstance(response_format, dict):
        schema = response_format.get("schema")
        if response_format.get("type") == "json_object" and isinstance(schema, dict):
            raw["response_format"] = _schema_format(schema)
        elif isinstance(named_schema := response_format.get("json_schema"), dict):
            named_schema.setdefault("name", _SCHEMA_NAME)
    _reasoning(raw, ignored)
    if isinstance(raw.get("messages"), list):
        _history(raw["messages"], ignored)
    _template(raw, ignored)


def completion(raw: Raw, ignored: IgnoredFields) -> None:
    """A completion.  Without `max_tokens` the limit is 16, so -1 has to stay."""
    best = raw.get("best_of")
    if _is(best, raw.get("n") or 1):
        del raw["best_of"]
    sampled(raw, ignored)
    _guided(raw, ignored)


def response(raw: Raw, ignored: IgnoredFields) -> None:
    """OpenAI's Responses API."""
    _without_billing(raw, "instructions", ignored)
    for name in ("max_tokens", "max_completion_tokens", "num_predict"):
        _rename(raw, name, "max_output_tokens", ignored)
    _keep_alive(raw, ignored)
    _refuse(raw, _UNSUPPORTED_IN_RESPONSES)
    _common(raw, ignored, except_for="truncation")
    _unlimited(raw, "max_output_tokens")
    _tools(raw, ("function", "custom", "namespace"), ignored)
    if isinstance(choice := raw.get("tool_choice"), dict):
        _tools(choice, ("function", "custom"), ignored, "tool_choice")
    if raw.get("top_logprobs"):
        ignored.add("top_logprobs")
        del raw["top_logprobs"]
    text = raw.get("text")
    if isinstance(text, dict):
        _drop(text, "verbosity", ("medium",), ignored, "text")
        text_format = text.get("format")
        if isinstance(text_format, dict) and text_format.get("type") == "json_schema":
            text_format.setdefault("name", _SCHEMA_NAME)
    if isinstance(raw.get("include"), list):
        if raw["include"]:
            ignored.add("include")
        del raw["include"]


def messages(raw: Raw, ignored: IgnoredFields) -> None:
    """Anthropic's Messages API."""
    _keep_alive(raw, ignored)
    counted_messages(raw, ignored)


def counted_messages(raw: Raw, ignored: IgnoredFields) -> None:
    """Messages whose tokens are only counted."""
    _without_billing(raw, "system", ignored)
    _common(raw, ignored, stop="stop_sequences")
    _tools(raw, ("custom",), ignored)
    messages = raw.get("messages")
    for index, message in enumerate(messages if isinstance(messages, list) else ()):
        if isinstance(message, dict) and isinstance(message.get("content"), list):
            _blocks(message, ("messages", index), ignored)


def embedding(raw: Raw, ignored: IgnoredFields) -> None:
    _keep_alive(raw, ignored)
    _common(raw, ignored)


# -- parts ---------------------------------------------------------------------------------------


def _keep_alive(raw: Raw, ignored: IgnoredFields) -> None:
    """LM Studio's name of `keep_alive`."""
    _rename(raw, "ttl", "keep_alive", ignored)


def _rename(raw: Raw, name: str, here: str, ignored: IgnoredFields) -> None:
    if name not in raw:
        return
    if raw.get(here) is None:
        raw[here] = raw.pop(name)
        return
    if raw[name] is not None:
        ignored.add(name)
    del raw[name]


def _refuse(raw: Raw, names: dict[str, tuple[Any, ...]]) -> None:
    """Raises UnsupportedParameter."""
    for name, neutral in names.items():
        if _asks(raw, name, neutral):
            raise UnsupportedParameter(
                f"'{name}' is part of OpenAI's API, but this box does not support it",
                loc=("body", name),
                kind="value_error.unsupported",
            )


def _common(raw: Raw, ignored: IgnoredFields, *, stop: str = "", except_for: str = "") -> None:
    """Fields that mean the same in all bodies; `stop` is the name of the stop strings."""
    for name in _COUNTS:
        if isinstance(value := raw.get(name), int):
            raw[name] = min(value, _MAX_TOKEN_COUNT)
    for name, neutral in _WITHOUT_EFFECT.items():
        if name != except_for:
            _drop(raw, name, neutral, ignored)
    tier = raw.get("service_tier")
    if isinstance(tier, str) and tier not in _TIERS:
        ignored.add("service_tier")
        del raw["service_tier"]
    # Values by which other samplers switch a setting off, or to its least.
    if _is(raw.get("top_k"), -1):
        raw["top_k"] = 0
    if _is(raw.get("top_p"), 0):
        raw["top_p"] = _MIN_TOP_P
    strings = raw.get(stop)
    if strings == "":
        del raw[stop]
    elif isinstance(strings, list) and "" in strings:
        raw[stop] = [string for string in strings if string != ""]


def _drop(
    raw: Raw, name: str, neutral: Iterable[Any], ignored: IgnoredFields, *path: str | int
) -> None:
    """Remove a field that has no meaning here; `raw` is at that path of the body."""
    if _asks(raw, name, neutral):
        ignored.add(*path, name)
        del raw[name]


def _asks(raw: Raw, name: str, neutral: Iterable[Any]) -> bool:
    """Whether a field has an effect; removes it otherwise."""
    value = raw.get(name)
    if value is not None and not any(_is(value, other) for other in neutral):
        return True
    raw.pop(name, None)
    return False


def _is(value: Any, other: Any) -> bool:
    # True == 1 in Python, not in JSON.
    return bool(value == other) and isinstance(value, bool) == isinstance(other, bool)


def _unlimited(raw: Raw, name: str) -> None:
    if _is(raw.get(name), _UNLIMITED):
        del raw[name]


def _tools(raw: Raw, supported: tuple[str, ...], ignored: IgnoredFields, *path: str) -> None:
    """Ignore tools that other servers run themselves; `raw` is at that path of the body."""
    tools = raw.get("tools")
    if not isinstance(tools, list):
        return
    raw["tools"] = []
    for index, tool in enumerate(tools):
        kind = tool.get("type") if isinstance(tool, dict) else None
        if isinstance(kind, str) and kind not in supported:
            ignored.add(*path, "tools", index, kind)
        else:
            raw["tools"].append(tool)


def _guided(raw: Raw, ignored: IgnoredFields) -> None:
    """Output constraints, as the format or the grammar of the answer."""
    constraints = [
        (name, kind, value)
        for name, kind in _GUIDED.items()
        if (value := raw.pop(name, None)) is not None
    ]
    structured = raw.get("structured_outputs")
    if isinstance(structured, dict):
        for kind, value in raw.pop("structured_outputs").items():
            if kind not in _GUIDED.values():
                ignored.add("structured_outputs", kind)
            elif value is not None:
                constraints.append(("structured_outputs", kind, value))
    for name, kind, value in constraints:
        is_chat = "messages" in raw
        target = "response_format" if kind == "json" and is_chat else "grammar"
        if raw.get(target) is not None or len(constraints) > 1:
            raise InvalidBody(f"{name} and another format exclude each other", loc=("body", name))
        if kind == "json":
            value = _schema(name, value)
        is_format = target == "response_format"
        raw[target] = _schema_format(value) if is_format else _grammar(name, kind, value)


def _schema(name: str, value: Any) -> Any:
    if isinstance(value, str):
        try:
            value = msgspec.json.decode(value)
        except (ValueError, RecursionError):
            raise InvalidBody("it is not valid JSON", loc=("body", name)) from None
    if not isinstance(value, dict):
        raise InvalidBody(
            "a JSON schema must be an object here", loc=("body", name), kind="type_error"
        )
    return value


def _schema_format(schema: Any) -> Raw:
    json_schema = {"name": _SCHEMA_NAME, "schema": schema, "strict": True}
    return {"type": "json_schema", "json_schema": json_schema}


def _grammar(name: str, kind: str, value: Any) -> str:
    """The constraint in the notation of the field `grammar`."""
    if kind == "json":
        return f"start: %json {json.dumps(value)}"
    if kind == "choice":
        if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
            raise InvalidBody("it must be a list of strings", loc=("body", name), kind="type_error")
        if not value or "" in value:
            raise InvalidBody("it must contain only non-empty strings", loc=("body", name))
        return "start: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in value)
    if not isinstance(value, str) or not value:
        raise InvalidBody("it must be a non-empty string", loc=("body", name), kind="type_error")
    return value if kind == "grammar" else f"start: /{_regex(value)}/"


def _regex(pattern: str) -> str:
    """As it is written between slashes, where slashes and line breaks have to be escaped."""
    replacements = {"/": r"\/", "\n": r"\n", "\\\n": r"\n"}
    return re.sub(
        r"\\.|[/\n]", lambda match: replacements.get(match[0], match[0]), pattern, flags=re.DOTALL
    )


def _without_billing(raw: Raw, name: str, ignored: IgnoredFields, *path: str | int) -> None:
    """Remove the line that Claude Code puts before its system prompt.

    It differs between conversations, so they would not share cached prefixes.
    """
    content = raw.get(name)
    block = content[0] if isinstance(content, list) and content else None
    text = block.get("text") if isinstance(block, dict) else content
    if not isinstance(text, str) or not text.startswith(BILLING):
        return
    ignored.add(*path, name, BILLING)
    _, _, rest = text.partition("\n")
    if isinstance(block, dict) and rest:
        block["text"] = rest
    else:
        raw[name] = (content[1:] or "") if isinstance(content, list) else rest


def _reasoning(raw: Raw, ignored: IgnoredFields) -> None:
    """Other names of the fields that control reasoning; `chat_template_kwargs` takes precedence."""
    setting: Any = None
    for name in _REASONING_FIELDS:
        value = raw.pop(name, None)
        if isinstance(value, dict):  # {"type": "enabled", "budget_tokens": 1024}
            for more in value:
                if more != "type":
                    ignored.add(name, more)
            value = {"disabled": False, "enabled": True, "adaptive": True, "auto": None}.get(
                str(value.get("type")), value
            )
        if value is None:
            continue
        if not isinstance(value, bool) and value not in _EFFORTS:
            raise InvalidBody(
                f"it must be true, false or one of {', '.join(_EFFORTS)}", loc=("body", name)
            )
        setting = value
    reasoning = raw.get("reasoning")
    if isinstance(reasoning, dict):  # OpenRouter's
        del raw["reasoning"]
        effort, enabled = reasoning.get("effort"), reasoning.get("enabled")
        for more in reasoning:
            if more not in ("effort", "enabled"):
                ignored.add("reasoning", more)
        setting = effort if isinstance(effort, str) else enabled
    if isinstance(setting, str):
        if raw.get("reasoning_effort") is None:
            raw["reasoning_effort"] = setting
    elif isinstance(setting, bool):
        variables = raw.get("chat_template_kwargs")
        if variables is None:
            variables = raw["chat_template_kwargs"] = {}
        if isinstance(variables, dict):
            variables.setdefault("enable_thinking", setting)
            variables.setdefault("thinking", setting)


def _template(raw: Raw, ignored: IgnoredFields) -> None:
    """Raises InvalidBody for variables that this box sets itself."""
    variables = raw.get("chat_template_kwargs")
    if not isinstance(variables, dict):
        return
    for name, value in list(variables.items()):
        loc = ("chat_template_kwargs", name)
        if name in TEMPLATE_OWN:
            raise InvalidBody(
                f"'{quoted(name)}' is set by this box: choose another name", loc=("body", *loc)
            )
        if value is None or isinstance(value, dict | list):
            if value is not None:
                ignored.add(*loc)
            del variables[name]


def text_of_arguments(arguments: Any) -> str:
    """As JSON text; some clients send the value itself."""
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def text_of_result(result: Any) -> Any:
    """A tool's result as text; a list of parts stays as it is."""
    if isinstance(result, str | list):
        return result
    return "" if result is None else text_of_arguments(result)


def _history(messages: list[Any], ignored: IgnoredFields) -> None:
    """The messages of a chat.

    Calls and results are completed, where clients leave fields out or write them otherwise: a
    refusal would end the chat, since every later request repeats them.
    """
    unanswered: deque[str] = deque()
    answered: set[str] = set()
    for index, message in enumerate(messages):
        if not isinstance(message, dict):
            continue
        _images(message.get("content"), ("messages", index, "content"), ignored)
        if message.get("role") == "system" and index == 0:
            _without_billing(message, "content", ignored, "messages", index)
        elif message.get("role") == "assistant":
            for name in ("audio", "function_call"):
                _drop(message, name, (), ignored, "messages", index)
            tool_calls = message.get("tool_calls")
            calls = tool_calls if isinstance(tool_calls, list) else []
            for number, call in enumerate(call for call in calls if isinstance(call, dict)):
                _call(call, f"call_{index}_{number}")
                if isinstance(call["id"], str):
                    unanswered.append(call["id"])
        elif message.get("role") == "tool":
            if message.get("tool_call_id") is None:
                while unanswered and unanswered[0] in answered:
                    unanswered.popleft()
                message["tool_call_id"] = unanswered.popleft() if unanswered else ""
            elif isinstance(message["tool_call_id"], str):
                answered.add(message["tool_call_id"])
            message["content"] = text_of_result(message.get("content"))


def _images(content: Any, path: tuple[str | int, ...], ignored: IgnoredFields) -> None:
    for place, part in enumerate(content if isinstance(content, list) else ()):
        image = part.get("image_url") if isinstance(part, dict) else None
        if isinstance(image, dict):
            without_detail(image, ignored, *path, place, "image_url")


def without_detail(image: Raw, ignored: IgnoredFields, *path: str | int) -> None:
    """An image is read in the one way that the model's projector knows."""
    _drop(image, "detail", ("auto",), ignored, *path)


def _call(call: Raw, call_id: str) -> None:
    kind = "custom" if "custom" in call else "function"
    for field, value in (("id", call_id), ("type", kind)):
        if call.get(field) is None:
            call[field] = value
    function = call.get("function")
    if isinstance(function, dict):
        function["arguments"] = text_of_arguments(function.get("arguments"))


def _blocks(message: Raw, path: tuple[str | int, ...], ignored: IgnoredFields) -> None:
    known = []
    for index, block in enumerate(message["content"]):
        kind = block.get("type") if isinstance(block, dict) else None
        if kind in _SERVER_BLOCKS:
            ignored.add(*path, "content", index, str(kind))
            continue
        known.append(block)
        if kind == "tool_result" and isinstance(block.get("content"), list):
            _blocks(block, (*path, "content", index), ignored)
        elif kind == "tool_use":
            arguments = block.get("input")
            is_object = isinstance(arguments, dict)
            block["input"] = arguments if is_object else text_of_arguments(arguments)
    message["content"] = known
