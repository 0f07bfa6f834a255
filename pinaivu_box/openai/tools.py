"""Tools as functions that a model can call: those of a chat, custom tools, which take text, and
tools in namespaces of the Responses API."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Set
from typing import Annotated, Any

from msgspec import Meta, Struct

from pinaivu_box.openai.types import (
    AllowedTools,
    CustomDefinition,
    CustomTool,
    Function,
    FunctionName,
    NamedCustom,
    NamedTool,
    Rule,
    RuleFormat,
    TextFormat,
    Tool,
    ToolChoice,
    Typed,
)
from pinaivu_box.text import encodable

_INPUT = "input"  # the only argument of a custom tool
_MAX_ESCAPE_CHARACTERS = len("\\u0000")  # the longest end of a truncated text that is dropped


class ResponseFunction(Function, frozen=True, tag="function", tag_field="type"):
    pass


class FlatRule(Rule, frozen=True, tag="grammar", tag_field="type"):
    pass


class ResponseCustom(Typed, frozen=True, tag="custom"):
    name: FunctionName
    description: str | None = None
    format: TextFormat | FlatRule | None = None


class Namespace(Typed, frozen=True, tag="namespace"):
    name: FunctionName
    tools: Annotated[list[ResponseFunction | ResponseCustom], Meta(max_length=1024)]
    description: str | None = None


ResponseTool = ResponseFunction | ResponseCustom | Namespace


class ClientTool(Struct, frozen=True):
    """A tool as its client names it."""

    name: str
    namespace: str | None = None
    custom: bool = False


def model_name(name: str, namespace: str | None = None) -> str:
    """The name by which the model calls a tool."""
    if not namespace:
        return name
    return f"{namespace}{name}" if namespace.endswith("_") else f"{namespace}__{name}"


# -- of a chat -------------------------------------------------------------------------------------


def functions(tools: Iterable[Tool | CustomTool]) -> list[Function]:
    """The functions that the model sees."""
    return [tool.function if isinstance(tool, Tool) else _of_custom(tool) for tool in tools]


def custom_names(tools: Iterable[Tool | CustomTool]) -> set[str]:
    """The names of the custom tools."""
    return {tool.custom.name for tool in tools if isinstance(tool, CustomTool)}


def chosen_tools(choice: ToolChoice | None) -> tuple[str, Set[str] | None]:
    """The choice ("none", "auto", "required" or the name of the one tool to call), and the names of
    the tools that may be called; None for all."""
    match choice:
        case NamedTool(function=tool) | NamedCustom(custom=tool):
            return tool.name, {tool.name}
        case AllowedTools(allowed):
            return allowed.mode, {function.name for function in functions(allowed.tools)}
    return choice or "auto", None


# -- of a response ---------------------------------------------------------------------------------


def chat_tools(tools: Iterable[ResponseTool]) -> list[Tool | CustomTool]:
    """The same tools as a chat has them."""
    return [_chat_tool(tool, namespace) for tool, namespace in _each(tools)]


def client_tools(tools: Iterable[ResponseTool]) -> dict[str, ClientTool]:
    """The tools by the names that the model calls."""
    return {
        model_name(tool.name, namespace): ClientTool(
            tool.name, namespace, isinstance(tool, ResponseCustom)
        )
        for tool, namespace in _each(tools)
    }


def model_names(names: Set[str], tools: Mapping[str, ClientTool]) -> list[str]:
    """The model's names of the tools that the client calls by these names.  A tool with exactly
    such a name comes before tools of that name in namespaces."""
    matches = {
        full_name: tool.name
        for full_name, tool in tools.items()
        if full_name in names or (tool.name in names and tool.name not in tools)
    }
    return [*matches, *(names - matches.keys() - set(matches.values()))]


# -- calls -----------------------------------------------------------------------------------------


def function_call(call_id: str, name: str, arguments: str) -> dict[str, Any]:
    """A call in a message of the assistant, in the form that the engine reads."""
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def custom_arguments(text: str) -> str:
    """The arguments of a call to a custom tool."""
    return json.dumps({_INPUT: text}, ensure_ascii=False)


def custom_input(arguments: str) -> str:
    """The text in the arguments of a call to a custom tool; `arguments` may be truncated."""
    candidates = [
        arguments,
        *(arguments[: len(arguments) - cut] + '"}' for cut in range(_MAX_ESCAPE_CHARACTERS)),
    ]
    for candidate in candidates:
        try:
            value = json.loads(candidate)
        except (ValueError, RecursionError):
            continue
        text = value.get(_INPUT) if isinstance(value, dict) else None
        return encodable(text) if isinstance(text, str) else arguments
    return arguments


def _each(
    tools: Iterable[ResponseTool],
) -> Iterable[tuple[ResponseFunction | ResponseCustom, str | None]]:
    for tool in tools:
        if isinstance(tool, Namespace):
            yield from ((inner, tool.name) for inner in tool.tools)
        else:
            yield tool, None


def _chat_tool(tool: ResponseFunction | ResponseCustom, namespace: str | None) -> Tool | CustomTool:
    name = model_name(tool.name, namespace)
    if isinstance(tool, ResponseFunction):
        return Tool(Function(name, tool.description, tool.parameters, tool.strict))
    rule = tool.format
    tool_format = RuleFormat(rule) if isinstance(rule, FlatRule) else rule
    return CustomTool(CustomDefinition(name, tool.description, tool_format))


def _of_custom(tool: CustomTool) -> Function:
    """A regular expression is enforced.  A grammar is only described: the text is inside a JSON
    string, so a context-free grammar would have to know of escapes."""
    custom, text = tool.custom, {"type": "string"}
    description = [custom.description or ""]
    if isinstance(custom.format, RuleFormat):
        rule = custom.format.grammar
        # The model reads this sentence: changing it changes the prompt, and so the answers.
        description += [f"The {_INPUT} keeps to this grammar ({rule.syntax}):", rule.definition]
        if rule.syntax == "regex":
            text["pattern"] = f"^(?:{rule.definition})$"
    parameters = {
        "type": "object",
        "properties": {_INPUT: text},
        "required": [_INPUT],
        "additionalProperties": False,
    }
    return Function(custom.name, "\n".join(filter(None, description)), parameters)
