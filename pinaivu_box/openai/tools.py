"""Tools as functions for a model: also custom ones, which are called with text, and those in the
namespaces of a response."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Set
from typing import Annotated

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
    Schema,
    TextFormat,
    Tool,
    ToolChoice,
)
from pinaivu_box.text import encodable

_INPUT = "input"  # the one argument of a custom tool
_ESCAPE = len("\\u0000")  # the longest end of a text that may have to go, if it was cut off


class ResponseFunction(
    Struct, frozen=True, forbid_unknown_fields=True, tag="function", tag_field="type"
):
    name: FunctionName
    description: str | None = None
    parameters: Schema | None = None
    strict: bool | None = None


class FlatRule(Rule, frozen=True, forbid_unknown_fields=True, tag="grammar", tag_field="type"):
    pass


class ResponseCustom(
    Struct, frozen=True, forbid_unknown_fields=True, tag="custom", tag_field="type"
):
    name: FunctionName
    description: str | None = None
    format: TextFormat | FlatRule | None = None


class Namespace(Struct, frozen=True, forbid_unknown_fields=True, tag="namespace", tag_field="type"):
    name: FunctionName
    tools: Annotated[list[ResponseFunction | ResponseCustom], Meta(max_length=1024)]
    description: str | None = None


ResponseTool = ResponseFunction | ResponseCustom | Namespace


class Called(Struct, frozen=True):
    """How the client knows a function of the model's."""

    name: str
    namespace: str | None = None
    custom: bool = False


def named(name: str, namespace: str | None = None) -> str:
    """As the model knows a tool."""
    if not namespace:
        return name
    return f"{namespace}{name}" if namespace.endswith("_") else f"{namespace}__{name}"


# -- of a chat -------------------------------------------------------------------------------------


def functions(tools: Iterable[Tool | CustomTool]) -> list[Function]:
    """What the model is told."""
    return [tool.function if isinstance(tool, Tool) else _of_custom(tool) for tool in tools]


def customs(tools: Iterable[Tool | CustomTool]) -> set[str]:
    """The names of those that are called with text."""
    return {tool.custom.name for tool in tools if isinstance(tool, CustomTool)}


def wanted(choice: ToolChoice | None) -> tuple[str, Set[str] | None]:
    """ "none", "auto", "required" or the name of the one tool that is to be called; and which tools
    may be called, None for all."""
    match choice:
        case NamedTool(function=tool) | NamedCustom(custom=tool):
            return tool.name, {tool.name}
        case AllowedTools(allowed):
            return allowed.mode, {one.name for one in functions(allowed.tools)}
    return choice or "auto", None


# -- of a response ---------------------------------------------------------------------------------


def chat_tools(tools: Iterable[ResponseTool]) -> list[Tool | CustomTool]:
    """The same tools of a chat."""
    return [_chat_tool(tool, namespace) for tool, namespace in _each(tools)]


def called(tools: Iterable[ResponseTool]) -> dict[str, Called]:
    """Of each name that the model may call, what the client is told."""
    return {
        named(tool.name, namespace): Called(tool.name, namespace, isinstance(tool, ResponseCustom))
        for tool, namespace in _each(tools)
    }


def names_of(name: str, known: Mapping[str, Called]) -> list[str]:
    """The model's names of the tools that the client calls so.  What the model calls so is meant
    before those in namespaces whose own name it is."""
    if name in known:
        return [name]
    return [one for one, its in known.items() if its.name == name] or [name]


def all_names_of(names: Set[str], known: Mapping[str, Called]) -> list[str]:
    """The same of several names; each of `known` is looked at once."""
    found = {
        one: its.name
        for one, its in known.items()
        if one in names or (its.name in names and its.name not in known)
    }
    return [*found, *(names - found.keys() - set(found.values()))]


# -- calls of custom tools -------------------------------------------------------------------------


def as_arguments(text: str) -> str:
    """The arguments of a call to a custom tool."""
    return json.dumps({_INPUT: text}, ensure_ascii=False)


def as_input(arguments: str) -> str:
    """The text that a custom tool is called with; `arguments` may have been cut off."""
    whole = [arguments, *(arguments[: len(arguments) - cut] + '"}' for cut in range(_ESCAPE))]
    for one in whole:
        try:
            given = json.loads(one)
        except (ValueError, RecursionError):
            continue
        text = given.get(_INPUT) if isinstance(given, dict) else None
        return encodable(text) if isinstance(text, str) else arguments
    return arguments


def _each(
    tools: Iterable[ResponseTool],
) -> Iterable[tuple[ResponseFunction | ResponseCustom, str | None]]:
    for tool in tools:
        if isinstance(tool, Namespace):
            yield from ((one, tool.name) for one in tool.tools)
        else:
            yield tool, None


def _chat_tool(tool: ResponseFunction | ResponseCustom, namespace: str | None) -> Tool | CustomTool:
    name = named(tool.name, namespace)
    if isinstance(tool, ResponseFunction):
        return Tool(Function(name, tool.description, tool.parameters, tool.strict))
    flat = tool.format
    form = RuleFormat(flat) if isinstance(flat, FlatRule) else flat
    return CustomTool(CustomDefinition(name, tool.description, form))


def _of_custom(tool: CustomTool) -> Function:
    """What a regular expression says is held to, what a grammar says is told: its text stands in a
    JSON string, where a context-free grammar would have to know of escapes."""
    its, text = tool.custom, {"type": "string"}
    told = [its.description or ""]
    if isinstance(its.format, RuleFormat):
        rule = its.format.grammar
        told += [f"The {_INPUT} keeps to this grammar ({rule.syntax}):", rule.definition]
        if rule.syntax == "regex":
            text["pattern"] = f"^(?:{rule.definition})$"
    parameters = {
        "type": "object",
        "properties": {_INPUT: text},
        "required": [_INPUT],
        "additionalProperties": False,
    }
    return Function(its.name, "\n".join(one for one in told if one), parameters)
