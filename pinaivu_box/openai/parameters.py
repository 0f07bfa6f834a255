"""What programs send under other names and with other values, brought to those of the wire types.

Each function prepares the raw body of one endpoint, before its type is applied: names of other
servers that mean something here are renamed, values are read as their senders mean them, and what
means nothing here is passed over and said (see `fields.Passed`).  Whatever is not of the expected
kind is left for the type to refuse.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable
from typing import Any

import msgspec

from pinaivu_box.chat_format import TEMPLATE_OWN
from pinaivu_box.errors import InvalidBody, UnsupportedParameter, quoted
from pinaivu_box.openai.fields import BILLING, Passed

Raw = dict[str, Any]

# Name elsewhere -> name here.
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
# Numbers of tokens.  More than the largest that is carried, which no context holds, mean as much.
_COUNTS = ("max_tokens", "max_completion_tokens", "max_output_tokens", "min_tokens")
_LARGEST_COUNT = 2**31 - 1
# top_p 0 asks for the likeliest token alone; proofs carry more than 0.
_LEAST_TOP_P = 1e-9
_SCHEMA_NAME = "answer"  # of a schema that has none
# What asks for another kind of answer than text: to pass it over would break who asks.
_NOT_SERVED: dict[str, tuple[Any, ...]] = {  # name -> values that change nothing
    "audio": (),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
}
# What names a state that is kept elsewhere: to pass it over would lose a conversation.
_NOT_SERVED_IN_RESPONSES: dict[str, tuple[Any, ...]] = {"conversation": (), "prompt": ()}
_MEANINGLESS: dict[str, tuple[Any, ...]] = {
    "moderation": (),
    "prompt_cache_retention": ("in_memory",),
    "verbosity": ("medium",),
    "web_search_options": (),
    "truncation": ("disabled",),
    "max_tool_calls": (),
    "best_of": (1,),
}
_TIERS = ("auto", "default", "flex", "priority", "scale", "standard_only")
_THOUGHT = ("think", "thinking", "enable_thinking")
_EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh")
# Blocks of Anthropic's that its servers make, and that no model here can read.
_SERVER_BLOCKS = (
    "redacted_thinking", "server_tool_use", "web_search_tool_result", "web_fetch_tool_result",
    "code_execution_tool_result", "bash_code_execution_tool_result",
    "text_editor_code_execution_tool_result", "tool_search_tool_result", "mcp_tool_use",
    "mcp_tool_result", "container_upload", "compaction", "tool_reference",
)  # fmt: skip


def sampled(raw: Raw, passed: Passed) -> None:
    """A chat or a plain completion."""
    for name in ("num_predict", "n_predict"):
        if _is(raw.get(name), -2):  # until the context is full
            raw[name] = _UNLIMITED
    for name, here in _RENAMED.items():
        _rename(raw, name, here, passed)
    _cut(raw)
    _refuse(raw, _NOT_SERVED)
    _pass_over(raw, passed)
    _values(raw, "stop")


def chat(raw: Raw, passed: Passed) -> None:
    sampled(raw, passed)
    _tools(raw, ("function", "custom"), passed)
    for name in ("store", "metadata"):  # nobody keeps them here
        if _asks(raw, name, (False, {})):
            passed.over(name)
    choice = raw.get("tool_choice")
    if isinstance(choice, dict) and isinstance(choice.get("allowed_tools"), dict):
        path = ("tool_choice", "allowed_tools")
        _tools(choice["allowed_tools"], ("function", "custom"), passed, *path)
    for name in ("max_tokens", "max_completion_tokens"):
        _unlimited(raw, name)
    _guided(raw, passed)
    form = raw.get("response_format")
    if isinstance(form, dict):
        if form.get("type") == "json_object" and isinstance(form.get("schema"), dict):
            raw["response_format"] = _schema_format(form["schema"])
        elif isinstance(named := form.get("json_schema"), dict):
            named.setdefault("name", _SCHEMA_NAME)
    _thoughts(raw, passed)
    _system(raw, passed)
    _template(raw, passed)
    messages = raw.get("messages")
    if isinstance(messages, list):
        _calls(messages)
        for place, message in enumerate(messages):
            if isinstance(message, dict) and message.get("role") == "assistant":
                for name in ("audio", "function_call"):
                    if message.get(name) is not None:
                        passed.over("messages", place, name)
                        del message[name]


def completion(raw: Raw, passed: Passed) -> None:
    """Here no `max_tokens` means 16, so that -1 is kept."""
    best = raw.get("best_of")
    if _is(best, raw.get("n") or 1):
        del raw["best_of"]
    sampled(raw, passed)
    _guided(raw, passed)


def response(raw: Raw, passed: Passed) -> None:
    _without_billing(raw, "instructions", passed)
    for name in ("max_tokens", "max_completion_tokens", "num_predict"):
        _rename(raw, name, "max_output_tokens", passed)
    _cut(raw)
    kept(raw, passed)
    _refuse(raw, _NOT_SERVED_IN_RESPONSES)
    _pass_over(raw, passed, but="truncation")
    _values(raw)
    _unlimited(raw, "max_output_tokens")
    _tools(raw, ("function", "custom", "namespace"), passed)
    if isinstance(choice := raw.get("tool_choice"), dict):
        _tools(choice, ("function", "custom"), passed, "tool_choice")
    if raw.get("top_logprobs"):
        passed.over("top_logprobs")
        del raw["top_logprobs"]
    text = raw.get("text")
    if isinstance(text, dict):
        if _asks(text, "verbosity", ("medium",)):
            passed.over("text", "verbosity")
        text.pop("verbosity", None)
        form = text.get("format")
        if isinstance(form, dict) and form.get("type") == "json_schema":
            form.setdefault("name", _SCHEMA_NAME)
    if isinstance(raw.get("include"), list):
        if raw["include"]:
            passed.over("include")
        del raw["include"]


def messages(raw: Raw, passed: Passed) -> None:
    """Anthropic's."""
    _cut(raw)
    _without_billing(raw, "system", passed)
    _pass_over(raw, passed)
    _values(raw, "stop_sequences")
    tools = raw.get("tools")
    if isinstance(tools, list):
        kept = []
        for place, tool in enumerate(tools):
            kind = tool.get("type") if isinstance(tool, dict) else None
            if isinstance(kind, str) and kind != "custom":
                passed.over("tools", place, kind)
            else:
                kept.append(tool)
        raw["tools"] = kept
    listed = raw.get("messages")
    for place, message in enumerate(listed if isinstance(listed, list) else ()):
        if isinstance(message, dict) and isinstance(message.get("content"), list):
            _blocks(message, ("messages", place), passed)


def embedding(raw: Raw, passed: Passed) -> None:
    kept(raw, passed)
    _pass_over(raw, passed)


def kept(raw: Raw, passed: Passed) -> None:
    """Any body that has a model loaded."""
    _rename(raw, "ttl", _RENAMED["ttl"], passed)


# -- parts ---------------------------------------------------------------------------------------


def _rename(raw: Raw, name: str, here: str, passed: Passed) -> None:
    if name not in raw:
        return
    if raw.get(here) is None:
        raw[here] = raw.pop(name)
        return
    if raw[name] is not None:
        passed.over(name)
    del raw[name]


def _refuse(raw: Raw, names: dict[str, tuple[Any, ...]]) -> None:
    """Raises UnsupportedParameter."""
    for name, neutral in names.items():
        if _asks(raw, name, neutral):
            raise UnsupportedParameter(
                f"'{name}' is part of OpenAI's API but not served by this box",
                loc=("body", name),
                kind="value_error.unsupported",
            )


def _pass_over(raw: Raw, passed: Passed, *, but: str = "") -> None:
    for name, neutral in _MEANINGLESS.items():
        if name == but:
            continue
        if _asks(raw, name, neutral):
            passed.over(name)
        raw.pop(name, None)
    tier = raw.get("service_tier")
    if isinstance(tier, str) and tier not in _TIERS:
        passed.over("service_tier")
        del raw["service_tier"]


def _asks(raw: Raw, name: str, neutral: Iterable[Any]) -> bool:
    """Whether it asks for something; takes it out otherwise."""
    value = raw.get(name)
    if value is not None and not any(_is(value, one) for one in neutral):
        return True
    raw.pop(name, None)
    return False


def _is(value: Any, other: Any) -> bool:
    # True == 1 in Python, not in JSON.
    return bool(value == other) and isinstance(value, bool) == isinstance(other, bool)


def _values(raw: Raw, stop: str = "") -> None:
    """What samplers elsewhere write for "off" and for "as little as there is"."""
    if _is(raw.get("top_k"), -1):
        raw["top_k"] = 0
    if _is(raw.get("top_p"), 0):
        raw["top_p"] = _LEAST_TOP_P
    given = raw.get(stop)
    if given == "":
        del raw[stop]
    elif isinstance(given, list) and "" in given:
        raw[stop] = [one for one in given if one != ""]


def _cut(raw: Raw) -> None:
    for name in _COUNTS:
        if isinstance(value := raw.get(name), int):
            raw[name] = min(value, _LARGEST_COUNT)


def _unlimited(raw: Raw, name: str) -> None:
    if _is(raw.get(name), _UNLIMITED):
        del raw[name]


def _tools(raw: Raw, served: tuple[str, ...], passed: Passed, *path: str) -> None:
    """Tools that the servers of others run themselves are passed over; `raw` is at that path."""
    tools = raw.get("tools")
    if not isinstance(tools, list):
        return
    kept = []
    for place, tool in enumerate(tools):
        kind = tool.get("type") if isinstance(tool, dict) else None
        if isinstance(kind, str) and kind not in served:
            passed.over(*path, "tools", place, kind)
        else:
            kept.append(tool)
    raw["tools"] = kept


def _guided(raw: Raw, passed: Passed) -> None:
    """vLLM's words for what an answer must be, and llama.cpp's `json_schema`."""
    found: list[tuple[str, str, Any]] = []
    for name, kind in (
        ("guided_json", "json"), ("guided_regex", "regex"), ("guided_choice", "choice"),
        ("guided_grammar", "grammar"), ("json_schema", "json"),
    ):  # fmt: skip
        if (value := raw.pop(name, None)) is not None:
            found.append((name, kind, value))
    structured = raw.get("structured_outputs")
    if isinstance(structured, dict):
        for kind, value in raw.pop("structured_outputs").items():
            if kind not in ("json", "regex", "choice", "grammar"):
                passed.over("structured_outputs", kind)
            elif value is not None:
                found.append(("structured_outputs", kind, value))
    for name, kind, value in found:
        chats = "messages" in raw
        target = "response_format" if kind == "json" and chats else "grammar"
        if raw.get(target) is not None or len(found) > 1:
            raise InvalidBody(f"{name} and another format exclude each other", loc=("body", name))
        schema = _schema(name, value) if kind == "json" else {}
        if target == "response_format":
            raw[target] = _schema_format(schema)
        else:
            raw[target] = _grammar(name, kind, schema if kind == "json" else value)


def _schema(name: str, value: Any) -> Any:
    if isinstance(value, str):
        try:
            value = msgspec.json.decode(value)
        except (ValueError, RecursionError):
            raise InvalidBody("it is no JSON", loc=("body", name)) from None
    if not isinstance(value, dict):
        raise InvalidBody("a JSON schema is an object here", loc=("body", name), kind="type_error")
    return value


def _schema_format(schema: Any) -> Raw:
    named = {"name": _SCHEMA_NAME, "schema": schema, "strict": True}
    return {"type": "json_schema", "json_schema": named}


def _grammar(name: str, kind: str, value: Any) -> str:
    """In the notation of the field `grammar`."""
    if kind == "json":
        return f"start: %json {json.dumps(value)}"
    if kind == "choice":
        if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
            raise InvalidBody("it must be a list of texts", loc=("body", name), kind="type_error")
        if not value or "" in value:
            raise InvalidBody("a choice is of texts that are not empty", loc=("body", name))
        return "start: " + " | ".join(json.dumps(one, ensure_ascii=False) for one in value)
    if not isinstance(value, str) or not value:
        raise InvalidBody("it must be a text", loc=("body", name), kind="type_error")
    return value if kind == "grammar" else f"start: /{_regex(value)}/"


def _regex(pattern: str) -> str:
    """Between slashes, where a slash ends it and a line does."""
    made, escaped = [], False
    for one in pattern:
        made.append({"/": "/" if escaped else "\\/", "\n": "n" if escaped else "\\n"}.get(one, one))
        escaped = one == "\\" and not escaped
    return "".join(made)


def _system(raw: Raw, passed: Passed) -> None:
    """Of a chat."""
    messages = raw.get("messages")
    first = messages[0] if isinstance(messages, list) and messages else None
    if isinstance(first, dict) and first.get("role") == "system":
        _without_billing(first, "content", passed, "messages", 0)


def _without_billing(raw: Raw, name: str, passed: Passed, *path: str | int) -> None:
    """Take the line away that Claude Code puts before its system prompt, also through a proxy.

    It is another one in each conversation: none would find the other's prefix in the cache.
    """
    content = raw.get(name)
    block = content[0] if isinstance(content, list) and content else None
    text = block.get("text") if isinstance(block, dict) else content
    if not isinstance(text, str) or not text.startswith(BILLING):
        return
    passed.over(*path, name, BILLING)
    _, _, rest = text.partition("\n")
    if isinstance(block, dict) and rest:
        block["text"] = rest
    else:
        raw[name] = (content[1:] or "") if isinstance(content, list) else rest


def _thoughts(raw: Raw, passed: Passed) -> None:
    """Whether a model shall think, in the words of others; `chat_template_kwargs` counts more."""
    wanted: Any = None
    for name in _THOUGHT:
        value = raw.pop(name, None)
        if isinstance(value, dict):  # {"type": "enabled", "budget_tokens": 1024}
            for more in value:
                if more != "type":
                    passed.over(name, more)
            value = {"disabled": False, "enabled": True, "adaptive": True, "auto": None}.get(
                str(value.get("type")), value
            )
        if value is None:
            continue
        if not isinstance(value, bool) and value not in _EFFORTS:
            raise InvalidBody(
                f"it is true, false or one of {', '.join(_EFFORTS)}", loc=("body", name)
            )
        wanted = value
    reasoning = raw.get("reasoning")
    if isinstance(reasoning, dict):  # OpenRouter's
        del raw["reasoning"]
        effort, enabled = reasoning.get("effort"), reasoning.get("enabled")
        for more in reasoning:
            if more not in ("effort", "enabled"):
                passed.over("reasoning", more)
        wanted = effort if isinstance(effort, str) else enabled
    if isinstance(wanted, str):
        if raw.get("reasoning_effort") is None:
            raw["reasoning_effort"] = wanted
    elif isinstance(wanted, bool):
        given = raw.get("chat_template_kwargs")
        if given is None:
            given = raw["chat_template_kwargs"] = {}
        if isinstance(given, dict):
            given.setdefault("enable_thinking", wanted)
            given.setdefault("thinking", wanted)


def _template(raw: Raw, passed: Passed) -> None:
    """Raises InvalidBody for names that the template has of its own."""
    given = raw.get("chat_template_kwargs")
    if not isinstance(given, dict):
        return
    for name, value in list(given.items()):
        loc = ("chat_template_kwargs", name)
        if name in TEMPLATE_OWN:
            raise InvalidBody(
                f"'{quoted(name)}' is the template's own: choose another name", loc=("body", *loc)
            )
        if value is None or isinstance(value, dict | list):
            if value is not None:
                passed.over(*loc)
            del given[name]


def text_of_arguments(given: Any) -> str:
    """As JSON text; some programs send the value itself."""
    return given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)


def text_of_result(given: Any) -> Any:
    """A tool's result as text; parts of text stay what they are."""
    if isinstance(given, str | list):
        return given
    return "" if given is None else text_of_arguments(given)


def _calls(messages: list[Any]) -> None:
    """What programs leave out of the calls and results of a history, or write otherwise: it stands
    in every later request of that chat."""
    unanswered: deque[str] = deque()
    answered: set[str] = set()
    for place, message in enumerate(messages):
        if not isinstance(message, dict):
            continue
        if message.get("role") == "assistant" and isinstance(message.get("tool_calls"), list):
            calls = [one for one in message["tool_calls"] if isinstance(one, dict)]
            for number, call in enumerate(calls):
                _call(call, f"call_{place}_{number}")
            unanswered.extend(one["id"] for one in calls if isinstance(one["id"], str))
        elif message.get("role") == "tool":
            if message.get("tool_call_id") is None:
                while unanswered and unanswered[0] in answered:
                    unanswered.popleft()
                message["tool_call_id"] = unanswered.popleft() if unanswered else ""
            elif isinstance(message["tool_call_id"], str):
                answered.add(message["tool_call_id"])
            message["content"] = text_of_result(message.get("content"))


def _call(call: Raw, name: str) -> None:
    kind = "custom" if "custom" in call else "function"
    for field, value in (("id", name), ("type", kind)):
        if call.get(field) is None:
            call[field] = value
    function = call.get("function")
    if isinstance(function, dict):
        function["arguments"] = text_of_arguments(function.get("arguments"))


def _blocks(message: Raw, path: tuple[str | int, ...], passed: Passed) -> None:
    kept = []
    for place, block in enumerate(message["content"]):
        kind = block.get("type") if isinstance(block, dict) else None
        if kind in _SERVER_BLOCKS:
            passed.over(*path, "content", place, str(kind))
            continue
        kept.append(block)
        if kind == "tool_result" and isinstance(block.get("content"), list):
            _blocks(block, (*path, "content", place), passed)
        elif kind == "tool_use":
            given = block.get("input")
            block["input"] = given if isinstance(given, dict) else text_of_arguments(given)
    message["content"] = kept
