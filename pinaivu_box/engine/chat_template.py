"""Messages to a prompt, by the model's own Jinja template in a sandbox."""

from __future__ import annotations

import json
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

from jinja2 import TemplateError
from jinja2.meta import find_undeclared_variables
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pinaivu_box import chat_format
from pinaivu_box.errors import BadRequest, BoxError

# For files without a template; the format that llama.cpp also falls back to.
CHATML = (
    "{% for message in messages %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    # Jinja drops a template's last newline, so it is written as an expression.
    "{% endfor %}<|im_start|>assistant{{ '\\n' }}"
)


class ChatTemplate:
    """`source` is the template of the GGUF file, None if it has none."""

    def __init__(self, source: str | None, *, bos: str, eos: str) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _tojson
        environment.globals.update(
            raise_exception=_raise, strftime_now=lambda form: datetime.now(UTC).strftime(form)
        )
        source = source or CHATML
        try:
            self._template = environment.from_string(source)
            self._knows_tools = "tools" in find_undeclared_variables(environment.parse(source))
        except TemplateError as error:
            raise BoxError(f"the file's chat template is not valid Jinja: {error}") from error
        self.style = chat_format.style_of(source) if self._knows_tools else chat_format.TAGS
        self.thinks = chat_format.thinks(source)
        self._tokens = {"bos_token": bos, "eos_token": eos}

    def render(
        self,
        messages: list[dict[str, Any]],
        functions: list[dict[str, Any]] | None = None,
        variables: dict[str, Any] | None = None,
    ) -> str:
        """The prompt, ending where the assistant begins; BadRequest if the template objects.

        `functions` are what the model may call, `variables` more of the template's.
        """
        # "developer" is OpenAI's newer name of "system"; templates know only the older one.
        known = [{**m, "role": "system"} if m["role"] == "developer" else m for m in messages]
        values = {**(variables or {}), **self._tokens, "add_generation_prompt": True}
        if not self._knows_tools:
            return self._render(_in_words(known, functions or []), values)
        if functions:
            values["tools"] = [{"type": "function", "function": one} for one in functions]
        if not any("tool_calls" in message for message in known):
            return self._render(known, values)
        try:  # most templates want arguments as objects, some as the text that the API has
            return self._render([_with_objects(message) for message in known], values)
        except BadRequest:
            return self._render(known, values)

    def _render(self, messages: list[dict[str, Any]], values: dict[str, Any]) -> str:
        try:
            return self._try(messages, values)
        except BadRequest:
            if len(messages) < 2 or [one["role"] for one in messages[:2]] != ["system", "user"]:
                raise
        # Some templates know no system role (Gemma's): its words go before the user's.
        system, user = messages[:2]
        both = {**user, "content": f"{system['content']}\n\n{user['content']}"}
        return self._try([both, *messages[2:]], values)

    def _try(self, messages: list[dict[str, Any]], values: dict[str, Any]) -> str:
        try:
            return self._template.render(messages=messages, **values)
        except Exception as error:  # a template is a program from the model's file
            raise BadRequest(
                f"The model's chat template refused these messages: {error}.", param="messages"
            ) from error


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


def _raise(message: str) -> None:
    raise TemplateError(message)


def _tojson(value: Any, indent: int | None = None) -> str:
    # Jinja's own filter escapes for HTML, which a prompt must not be.
    return json.dumps(value, ensure_ascii=False, indent=indent)
