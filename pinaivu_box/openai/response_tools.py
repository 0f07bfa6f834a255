"""The tools of a response: custom ones and those in namespaces, as functions for a model."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Annotated, Any

from msgspec import Meta, Struct

from pinaivu_box.openai.types import Function, FunctionName, Schema, Tool

_INPUT = "input"  # the one argument of a custom tool, which is called with text


class ResponseFunction(
    Struct, frozen=True, forbid_unknown_fields=True, tag="function", tag_field="type"
):
    name: FunctionName
    description: str | None = None
    parameters: Schema | None = None
    strict: bool | None = None


class CustomTool(Struct, frozen=True, forbid_unknown_fields=True, tag="custom", tag_field="type"):
    """Called with text; what `format` says of it is told to the model."""

    name: FunctionName
    description: str | None = None
    format: dict[str, Any] | None = None


class Namespace(Struct, frozen=True, forbid_unknown_fields=True, tag="namespace", tag_field="type"):
    name: FunctionName
    tools: Annotated[list[ResponseFunction | CustomTool], Meta(max_length=1024)]
    description: str | None = None


ResponseTool = ResponseFunction | CustomTool | Namespace


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


def functions(tools: Iterable[ResponseTool]) -> list[Tool]:
    """What the model is told."""
    return [Tool(_function(tool, namespace)) for tool, namespace in _each(tools)]


def called(tools: Iterable[ResponseTool]) -> dict[str, Called]:
    """Of each name that the model may call, what the client is told."""
    return {
        named(tool.name, namespace): Called(tool.name, namespace, isinstance(tool, CustomTool))
        for tool, namespace in _each(tools)
    }


def as_arguments(text: str) -> str:
    """The arguments of a call to a custom tool."""
    return json.dumps({_INPUT: text}, ensure_ascii=False)


def as_input(arguments: str) -> str:
    """The text that a custom tool is called with; `arguments` may have been cut off."""
    try:
        given = json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
    text = given.get(_INPUT) if isinstance(given, dict) else None
    return text if isinstance(text, str) else arguments


def _each(
    tools: Iterable[ResponseTool],
) -> Iterable[tuple[ResponseFunction | CustomTool, str | None]]:
    for tool in tools:
        if isinstance(tool, Namespace):
            yield from ((one, tool.name) for one in tool.tools)
        else:
            yield tool, None


def _function(tool: ResponseFunction | CustomTool, namespace: str | None) -> Function:
    name = named(tool.name, namespace)
    if isinstance(tool, ResponseFunction):
        return Function(name, tool.description, tool.parameters, tool.strict)
    told, form = [tool.description or ""], tool.format or {}
    if form.get("type") == "grammar":
        told.append(f"The {_INPUT} keeps to this grammar ({form.get('syntax')}):")
        told.append(str(form.get("definition", "")))
    parameters = {
        "type": "object",
        "properties": {_INPUT: {"type": "string"}},
        "required": [_INPUT],
        "additionalProperties": False,
    }
    return Function(name, "\n".join(one for one in told if one), parameters)
