"""Messages to a prompt, by the model's own Jinja template.

A template is a program from the model's file.  Jinja's sandbox keeps it from our objects, but
bounds neither its steps nor its memory: so this runs in a child with limits (see
`sandboxed_template`).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import msgspec
from jinja2 import TemplateError, Undefined, nodes
from jinja2.ext import Extension
from jinja2.meta import find_undeclared_variables
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pinaivu_box import chat_format
from pinaivu_box.engine import message_forms
from pinaivu_box.engine.control_tokens import ControlTokens
from pinaivu_box.engine.message_forms import Message
from pinaivu_box.errors import BadRequest, ContextOverflow

Functions = list[dict[str, Any]]

_MAX_REASON_CHARACTERS = 500  # of a template's own error
INSTEAD = ": serve another file of this model, or use completions, which need no template"


class _Raised(Exception):
    """The template raised; the text is its message."""


class TemplateSetup(msgspec.Struct, array_like=True, frozen=True):
    """`source` is the template of the GGUF file, `model` names the model in errors, a prompt has at
    most `max_characters`, and `controls` are the control tokens that only the template can write
    (see `control_tokens`)."""

    source: str
    bos: str
    eos: str
    max_characters: int = 1 << 20
    model: str = "the model's file"
    controls: list[str] = []


class ChatTemplate:
    """A template as transformers' `apply_chat_template` and llama.cpp run it.

    `knows_tools` is whether it can describe functions.  Raises BadRequest if it is no template.
    """

    def __init__(self, setup: TemplateSetup) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols", _Generation],
        )
        environment.filters["tojson"] = _tojson
        environment.globals.update(raise_exception=_raise, strftime_now=_now)
        self._setup = setup
        try:
            self._template = environment.from_string(setup.source)
            undeclared = find_undeclared_variables(environment.parse(setup.source))
        except MemoryError:
            raise
        except Exception as error:  # also Python's, of the code that Jinja generates
            why = _reason(str(error))
            raise self._refusal(f"is not valid Jinja ({why}){INSTEAD}") from error
        self.knows_tools = "tools" in undeclared
        self._controls = ControlTokens(setup.controls)
        self._contents = self._controls.contents()

    def parts(
        self, messages: list[Message], functions: Functions, variables: dict[str, Any]
    ) -> list[str]:
        """The prompt in parts (see `control_tokens`), ending where the assistant begins.

        `functions` are what the model may call, `variables` more of the template's.  Raises
        BadRequest if the template raises on all forms of the messages (see `message_forms`),
        ContextOverflow if the prompt is too long.
        """
        self._contents = self._controls.contents()
        if variables.get(chat_format.CONTINUE) and messages and messages[-1]["role"] == "assistant":
            text = self._continued(messages, functions, variables)
        else:
            text = self._prompt(messages, functions, variables)
        # A template may make half a surrogate pair.
        return self._contents.parts(text.encode(errors="replace").decode())

    def _prompt(
        self, messages: list[Message], functions: Functions, variables: dict[str, Any]
    ) -> str:
        # "developer" is OpenAI's newer name of "system"; templates know only the older one.
        known = [{**m, "role": "system"} if m["role"] == "developer" else m for m in messages]
        more = {k: v for k, v in variables.items() if k not in chat_format.TEMPLATE_OWN}
        generate = bool(variables.get(chat_format.GENERATE, True))
        values = {**_defaults(), **more, chat_format.GENERATE: generate}
        if not self.knows_tools:
            return self._render(message_forms.in_words(known, functions), [None], values)
        return self._render(known, _as_tools(functions), values)

    def _continued(
        self, messages: list[Message], functions: Functions, variables: dict[str, Any]
    ) -> str:
        """The prompt up to the end of the last message's text, which is the assistant's."""
        others = {k: v for k, v in variables.items() if k != chat_format.GENERATE}
        before = self._prompt(messages[:-1], functions, others)
        last = messages[-1]
        if before.rstrip().endswith(chat_format.THINK):  # the text begins after the thoughts
            before = f"{before.rstrip()}\n\n{chat_format.THOUGHT}\n\n"
        return before + str(self._contents.marked(last["content"]) or "")

    def _render(self, messages: list[Message], tools: list[Any], values: dict[str, Any]) -> str:
        """The prompt of the first forms of messages and tools that the template accepts: it neither
        raises nor leaves out a message."""
        first: _Raised | None = None
        without: str | None = None
        for functions in tools:
            for form in message_forms.forms(messages):
                try:
                    text = self._try(form, {**values, "tools": functions})
                except _Raised as error:
                    first = first or error
                    continue
                if self._shows(text, messages):
                    return text
                without = text if without is None else without
        if text := self._in_parts(messages, {**values, "tools": tools[0]}):
            return text
        if without is not None:
            return without
        try:
            self._try([{"role": "user", "content": "Hello"}], {**values, "tools": None})
        except _Raised:
            raise self._refusal(f"fails on every chat ({first}){INSTEAD}") from None
        raise self._refusal(f"refuses these messages: {first}") from None

    def _in_parts(self, messages: list[Message], values: dict[str, Any]) -> str:
        """With contents in parts, for a template that knows no others; empty for all others."""
        try:
            text = self._try(message_forms.in_parts(messages), values)
        except _Raised:
            return ""
        return text if self._shows(text, messages) and not message_forms.raw(text) else ""

    def _shows(self, text: str, messages: list[Message]) -> bool:
        return message_forms.shown(self._contents.unmarked(text), messages)

    def _try(self, messages: list[Message], values: dict[str, Any]) -> str:
        parts, size, limit = [], 0, self._setup.max_characters
        try:
            marked = self._contents.marked({**values, "messages": messages})
            tokens = {"bos_token": self._setup.bos, "eos_token": self._setup.eos}
            for part in self._template.generate({**marked, **tokens}):
                parts.append(part)
                size += len(part)
                if size > limit:
                    break
        except MemoryError:
            raise
        except Exception as error:
            raise _Raised(_reason(self._contents.unmarked(str(error)))) from error
        if size > limit:
            raise ContextOverflow(f"The prompt has more than {limit} characters.")
        return "".join(parts)

    def _refusal(self, predicate: str) -> BadRequest:
        return BadRequest(
            f"The chat template of {self._setup.model} {predicate}.", param="messages"
        )


def _as_tools(functions: Functions) -> list[Any]:
    """The values that `tools` may have: without functions None as in transformers, or undefined as
    in llama.cpp."""
    if not functions:
        return [None, Undefined(name="tools")]
    forms = [functions]
    if (described := message_forms.described(functions)) != functions:
        forms.append(described)
    return [[{"type": "function", "function": function} for function in form] for form in forms]


def _reason(message: str) -> str:
    return message[:_MAX_REASON_CHARACTERS].rstrip(".")


# -- what templates find ---------------------------------------------------------------------------


class _Generation(Extension):
    """transformers' tag around an assistant's text, which marks it for training."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _defaults() -> dict[str, Any]:
    """Variables that transformers (`documents`) and llama.cpp define."""
    return {"documents": None, "date_string": _now("%d %b %Y"), "datetime": _now("%b %d %Y")}


def _now(form: str) -> str:
    return datetime.now(UTC).strftime(form)


def _raise(message: str) -> None:
    raise TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes for HTML, which a prompt must not be.
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
        default=_null,
    )


def _null(value: Any) -> None:
    if not isinstance(value, Undefined):
        raise TypeError(f"{type(value).__name__} cannot be written as JSON")


# -- in the child ----------------------------------------------------------------------------------


class Render(msgspec.Struct, array_like=True, frozen=True):
    """A job: the prompt of `messages`.  Without any, whether the template knows tools: b"1" or b"".

    `setup` is a TemplateSetup as msgpack, `functions` JSON text of a list.
    """

    setup: bytes
    messages: list[dict[str, Any]] | None = None
    functions: str | None = None
    variables: dict[str, Any] = {}


def make(_: bytes) -> Callable[[bytes], bytes]:
    """The jobs' function (see `sandbox`): a `Render` to msgpack of the prompt's parts."""
    decoder = msgspec.msgpack.Decoder(Render)
    loaded: dict[bytes, ChatTemplate] = {}  # an engine has one

    def run(payload: bytes) -> bytes:
        job = decoder.decode(payload)
        if job.setup not in loaded:
            loaded.clear()
            loaded[job.setup] = ChatTemplate(msgspec.msgpack.decode(job.setup, type=TemplateSetup))
        template = loaded[job.setup]
        if job.messages is None:
            return b"1" if template.knows_tools else b""
        try:
            functions = msgspec.json.decode(job.functions or "[]", type=Functions)
        except (msgspec.DecodeError, RecursionError):
            raise BadRequest("The tools are no list that can be read.", param="tools") from None
        return msgspec.msgpack.encode(template.parts(job.messages, functions, job.variables))

    return run
