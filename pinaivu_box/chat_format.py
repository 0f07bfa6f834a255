"""How models write tool calls and thoughts into their text: the families' conventions.

The engine reads from a model's chat template which one it is, and makes grammars of it; the box
finds the calls in the text again.  Sources: the chat templates of the model cards, and llama.cpp's
`common/chat.cpp`.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

# Variables and functions that chat templates always have.
TEMPLATE_OWN = frozenset({
    "messages", "tools", "add_generation_prompt", "continue_final_message", "bos_token",
    "eos_token", "unk_token", "pad_token", "raise_exception", "strftime_now", "range", "dict",
    "lipsum", "cycler", "joiner", "namespace", "self", "loop", "caller", "varargs", "kwargs",
})  # fmt: skip

# The variables with which a request makes the answer continue its last message, or ends the prompt
# with that without beginning an assistant's turn.
CONTINUE = "continue_final_message"
GENERATE = "add_generation_prompt"

THINK, THOUGHT = "<think>", "</think>"


@dataclass(frozen=True)
class Style:
    """A list of calls is `opening`, calls with `separator` between them, `closing`; a call is a
    JSON object with `name` and `arguments_key` between `before` and `after`.

    `trigger` is what shows in running text that calls come; without one, a text that begins with a
    brace is a call.
    """

    name: str
    trigger: str = ""
    opening: str = ""
    before: str = ""
    after: str = ""
    separator: str = ""
    closing: str = ""
    arguments_key: str = "arguments"


# Hermes and Qwen; also for models whose template knows no tools.
TAGS = Style(
    "tags",
    trigger="<tool_call>",
    before="<tool_call>\n",
    after="\n</tool_call>",
    separator="\n",
)
MISTRAL = Style(
    "mistral", trigger="[TOOL_CALLS]", opening="[TOOL_CALLS][", separator=", ", closing="]"
)
LLAMA = Style("llama", arguments_key="parameters")  # Llama 3: one call, and nothing around it
STYLES = {style.name: style for style in (TAGS, MISTRAL, LLAMA)}


def style_of(template: str) -> Style:
    """By the marks that a chat template teaches its model."""
    if "[TOOL_CALLS]" in template:
        return MISTRAL
    if "<tool_call>" not in template and re.search(r"[\"']parameters[\"']", template):
        return LLAMA
    return TAGS


def overlap(text: str, mark: str) -> int:
    """Length of the longest end of `text` with which `mark` begins, but not the whole mark."""
    at = max(0, len(text) - len(mark) + 1)
    while mark and (at := text.find(mark[0], at)) >= 0:
        if mark.startswith(text[at:]):
            return len(text) - at
        at += 1
    return 0


def instructions(functions: list[dict[str, Any]]) -> str:
    """For the system message of a model whose template knows no tools."""
    listed = "\n".join(json.dumps(function, ensure_ascii=False) for function in functions)
    example = '{"name": <function name>, "arguments": <object of arguments>}'
    return (
        f"You can call these functions, described as JSON:\n{listed}\n"
        f"To call one, answer with a JSON object inside tool_call tags, and nothing else:\n"
        f"<tool_call>\n{example}\n</tool_call>"
    )


# -- grammars ------------------------------------------------------------------------------------

# White space is where small models get lost: JSON is written in one way.
ONE_LINE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def call_grammar(
    style: Style,
    functions: list[dict[str, Any]],
    *,
    several: bool,
    free: bool,
    trigger: str,
    schema: str | None = None,
) -> str | None:
    """Lark grammar (llguidance's) of calls of these functions; None if there is nothing to hold.

    `trigger` is that of the style as Lark: a string, or a control token's number.  With `free` any
    text may stand around calls, or, with a JSON `schema`, in their place what follows that;
    otherwise there is at least one call, and nothing else.
    """
    if free and not style.trigger and schema is None:
        return None  # a text may begin with a brace and still be no call
    names = [f"call_{number}" for number in range(len(functions))]
    rules = [_call(style, name, each) for name, each in zip(names, functions, strict=True)]
    rules.append(f"call: {' | '.join(names)}")
    begin = style.opening + style.before
    again = _string(style.separator + style.before)
    after = _string(style.after)
    more = f"({again} call {after})*" if several and style.separator else ""
    rest = _string(begin.removeprefix(style.trigger))
    calls = f"{rest} call {after} {more} {_string(style.closing)}"
    if free and schema is not None:
        start = [f"start: ({trigger} {calls}) | answer", f"answer: %json {schema}"]
        free = False
    elif not free:
        start = [f"start: {trigger} {calls}"]
    elif trigger.startswith('"'):
        start = ["start: calls* text", f"trigger[lazy]: TEXT {trigger}", f"calls: trigger {calls}"]
    else:
        start = ["start: calls* text", f"calls: TEXT {trigger} {calls}"]
    text = ["text: TEXT", "TEXT: /(.|\\n)*/"] if free else []
    return "\n".join(["%llguidance {}", *start, *rules, *text]) + "\n"


def _string(text: str) -> str:
    """In Lark, which has no empty ones."""
    return json.dumps(text, ensure_ascii=False) if text else ""


def _call(style: Style, rule: str, function: dict[str, Any]) -> str:
    name = json.dumps(function["name"], ensure_ascii=False)
    head = _string(f'{{"name": {name}, "{style.arguments_key}": ')
    schema = dict(function.get("parameters") or {"type": "object", "properties": {}})
    if "properties" in schema:
        # The listed arguments are the wanted ones; a small model would go on inventing more.
        schema.setdefault("additionalProperties", False)
    schema.setdefault("type", "object")
    # Other keywords of a schema are advice unless it was called strict.
    schema["x-guidance"] = {**ONE_LINE, "lenient": not function.get("strict")}
    return f'{rule}: {head} {rule}_arguments "}}"\n{rule}_arguments: %json {json.dumps(schema)}'
