"""Messages to a prompt, by the model's own Jinja template.

A template is a program from the model's file.  Jinja's sandbox keeps it from our objects, but
bounds neither its steps nor its memory: so this runs in a child with limits (see `rendering`).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

import msgspec
from jinja2 import TemplateError
from jinja2.meta import find_undeclared_variables
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pinaivu_box import chat_format
from pinaivu_box.engine.control_tokens import Contents, ControlTokens
from pinaivu_box.errors import BadRequest, ContextOverflow

_REASON_LENGTH = 500  # of what a template says when it refuses

# For files without a template; the format that llama.cpp also falls back to.
CHATML = (
    "{% for message in messages %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    # Jinja drops a template's last newline, so it is written as an expression.
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant{{ '\\n' }}{% endif %}"
)


class ChatTemplate:
    """`source` is the template of the GGUF file; `knows_tools` says whether it has a place for
    functions.  Raises BadRequest if it is no template."""

    def __init__(self, source: str, *, bos: str, eos: str) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _tojson
        environment.globals.update(
            raise_exception=_raise, strftime_now=lambda form: datetime.now(UTC).strftime(form)
        )
        try:
            self._template = environment.from_string(source)
            self.knows_tools = "tools" in find_undeclared_variables(environment.parse(source))
        except MemoryError:
            raise
        except Exception as error:  # also what Python says of the code that Jinja makes of it
            raise BadRequest(
                f"The chat template of the model's file is not valid Jinja: {_reason(str(error))}.",
                param="messages",
            ) from error
        self._tokens = {"bos_token": bos, "eos_token": eos}
        self._most = 0
        self._contents = ControlTokens(()).contents()

    def render(
        self,
        messages: list[dict[str, Any]],
        functions: list[dict[str, Any]] | None = None,
        variables: dict[str, Any] | None = None,
        most: int = 1 << 20,
        contents: Contents | None = None,
    ) -> str:
        """The prompt, ending where the assistant begins; BadRequest if the template objects,
        ContextOverflow if it is longer than `most` characters.

        `functions` are what the model may call, `variables` more of the template's.  All that it is
        made of is marked in it as `contents` does.
        """
        self._most = most
        self._contents = contents or ControlTokens(()).contents()
        variables = variables or {}
        if variables.get(chat_format.CONTINUE) and messages and messages[-1]["role"] == "assistant":
            return self._continued(messages, functions, variables)
        # "developer" is OpenAI's newer name of "system"; templates know only the older one.
        known = [{**m, "role": "system"} if m["role"] == "developer" else m for m in messages]
        more = {k: v for k, v in variables.items() if k not in chat_format.TEMPLATE_OWN}
        generate = bool(variables.get(chat_format.GENERATE, True))
        values = {**more, **self._tokens, chat_format.GENERATE: generate}
        if not self.knows_tools:
            return self._render(_in_words(known, functions or []), values)
        if functions:
            values["tools"] = [{"type": "function", "function": one} for one in functions]
        if not any("tool_calls" in message for message in known):
            return self._render(known, values)
        try:  # most templates want arguments as objects, some as the text that the API has
            return self._render([_with_objects(message) for message in known], values)
        except ContextOverflow:
            raise
        except BadRequest:
            return self._render(known, values)

    def _continued(
        self,
        messages: list[dict[str, Any]],
        functions: list[dict[str, Any]] | None,
        variables: dict[str, Any],
    ) -> str:
        """The prompt up to the end of the last message's text, which is the assistant's."""
        own = (chat_format.CONTINUE, chat_format.GENERATE)
        others = {k: v for k, v in variables.items() if k not in own}
        before = self.render(messages[:-1], functions, others, self._most, self._contents)
        last = messages[-1]
        if before.rstrip().endswith(chat_format.THINK):  # the text begins after the thoughts
            before = f"{before.rstrip()}\n\n{chat_format.THOUGHT}\n\n"
        return before + str(self._contents.marked(last["content"]) or "")

    def _render(self, messages: list[dict[str, Any]], values: dict[str, Any]) -> str:
        try:
            return self._try(messages, values)
        except ContextOverflow:
            raise
        except BadRequest:
            taking_turns = _taking_turns(messages)
            if taking_turns != messages:
                return self._render(taking_turns, values)
            if len(messages) < 2 or [one["role"] for one in messages[:2]] != ["system", "user"]:
                raise
        # Some templates know no system role (Gemma's): its words go before the user's.
        system, user = messages[:2]
        both = {**user, "content": f"{system['content']}\n\n{user['content']}"}
        return self._try([both, *messages[2:]], values)

    def _try(self, messages: list[dict[str, Any]], values: dict[str, Any]) -> str:
        parts, size = [], 0
        try:
            given = self._contents.marked({**values, "messages": messages})
            for part in self._template.generate({**given, **self._tokens}):
                parts.append(part)
                size += len(part)
                if size > self._most:
                    break
        except MemoryError:
            raise
        except Exception as error:
            why = _reason(self._contents.unmarked(str(error)))
            raise BadRequest(
                f"The model's chat template refused these messages: {why}.", param="messages"
            ) from error
        if size > self._most:
            raise ContextOverflow(
                f"The prompt has more than {self._most} characters, which is more than the model's "
                "context here can hold: shorten the messages."
            )
        return "".join(parts)


def _taking_turns(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For templates that insist on turns: one system message, at the beginning, and what a user
    says in several messages in one."""
    made: list[dict[str, Any]] = []
    for message in messages:
        said = message
        if message["role"] == "system" and made and made[-1]["role"] != "system":
            said = {**message, "role": "user"}
        if made and made[-1]["role"] == said["role"] and said["role"] in ("system", "user"):
            text = f"{made[-1]['content']}\n\n{said['content']}"
            made[-1] = {**made[-1], "content": text}
        else:
            made.append(said)
    return made


def _with_objects(message: dict[str, Any]) -> dict[str, Any]:
    calls = []
    for call in message.get("tool_calls", ()):
        function = call["function"]
        with suppress(ValueError):
            function = {**function, "arguments": json.loads(function["arguments"])}
        calls.append({**call, "function": function})
    return {**message, "tool_calls": calls} if calls else message


def _in_words(
    messages: list[dict[str, Any]], functions: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Calls and their results as text, for a template that knows neither."""
    said: list[dict[str, Any]] = []
    turn = ""
    for message in messages:
        words = _one_in_words(message)
        if turn == "tool" and words["role"] == "user":  # one turn, which templates insist on
            words["content"] = f"{said.pop()['content']}\n{words['content']}"
        said.append(words)
        turn = message["role"]
    if functions:
        told = chat_format.instructions(functions)
        if said and said[0]["role"] == "system":
            told = f"{said.pop(0)['content']}\n\n{told}"
        said.insert(0, {"role": "system", "content": told})
    return said


def _one_in_words(message: dict[str, Any]) -> dict[str, Any]:
    if message["role"] == "tool":
        content = f"<tool_response>\n{message['content']}\n</tool_response>"
        return {"role": "user", "content": content}
    calls = [call["function"] for call in message.get("tool_calls", ())]
    texts = [message["content"]] if message["content"] else []
    style = chat_format.TAGS
    for call in calls:
        name = json.dumps(call["name"], ensure_ascii=False)
        written = f'{{"name": {name}, "arguments": {call["arguments"]}}}'
        texts.append(f"{style.before}{written}{style.after}")
    others = {key: value for key, value in message.items() if key != "tool_calls"}
    return {**others, "content": "\n".join(texts)}


def _reason(said: str) -> str:
    return said[:_REASON_LENGTH].rstrip(".")


def _raise(message: str) -> None:
    raise TemplateError(message)


def _tojson(value: Any, indent: int | None = None) -> str:
    # Jinja's own filter escapes for HTML, which a prompt must not be.
    return json.dumps(value, ensure_ascii=False, indent=indent)


# -- in the child ----------------------------------------------------------------------------------


class Render(msgspec.Struct, array_like=True, frozen=True):
    """A job: what `messages` become.  Without any, whether `source` knows tools: b"1" or b"".

    `functions` is JSON text of a list, `most` is in characters, and `controls` are the texts of
    control tokens that are nothing but text where they are not the template's own.
    """

    source: str
    bos: str
    eos: str
    messages: list[dict[str, Any]] | None = None
    functions: str | None = None
    variables: dict[str, Any] = {}
    most: int = 0
    controls: list[str] = []


def make(_: bytes) -> Callable[[bytes], bytes]:
    """The jobs' function (see `sandbox`): a `Render` to msgpack of the prompt's parts (see
    `control_tokens`)."""
    decoder = msgspec.msgpack.Decoder(Render)
    kept: dict[str, tuple[ChatTemplate, ControlTokens]] = {}  # an engine has one

    def run(payload: bytes) -> bytes:
        asked = decoder.decode(payload)
        if asked.source not in kept:
            kept.clear()
            made = ChatTemplate(asked.source, bos=asked.bos, eos=asked.eos)
            kept[asked.source] = made, ControlTokens(asked.controls)
        template, controls = kept[asked.source]
        if asked.messages is None:
            return b"1" if template.knows_tools else b""
        try:
            functions = json.loads(asked.functions) if asked.functions else None
        except (ValueError, RecursionError):
            raise BadRequest("The tools are no list that can be read.", param="tools") from None
        contents = controls.contents()
        text = template.render(asked.messages, functions, asked.variables, asked.most, contents)
        text = text.encode(errors="replace").decode()  # a template may make half a surrogate pair
        return msgspec.msgpack.encode(contents.parts(text))

    return run
