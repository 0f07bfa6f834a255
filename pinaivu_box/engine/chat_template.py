"""Messages to a prompt, by the model's own Jinja template in a sandbox."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

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
        try:
            self._template = environment.from_string(source or CHATML)
        except TemplateError as error:
            raise BoxError(f"the file's chat template is not valid Jinja: {error}") from error
        self._tokens = {"bos_token": bos, "eos_token": eos}

    def render(self, messages: list[dict[str, Any]]) -> str:
        """The prompt, ending where the assistant begins; BadRequest if the template objects."""
        # "developer" is OpenAI's newer name of "system"; templates know only the older one.
        known = [{**m, "role": "system"} if m["role"] == "developer" else m for m in messages]
        try:
            return self._template.render(messages=known, add_generation_prompt=True, **self._tokens)
        except Exception as error:  # a template is a program from the model's file
            raise BadRequest(
                f"The model's chat template refused these messages: {error}.", param="messages"
            ) from error


def _raise(message: str) -> None:
    raise TemplateError(message)


def _tojson(value: Any, indent: int | None = None) -> str:
    # Jinja's own filter escapes for HTML, which a prompt must not be.
    return json.dumps(value, ensure_ascii=False, indent=indent)
