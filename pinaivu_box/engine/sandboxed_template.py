"""The model's chat template, run in a sandbox: what it may cost, and when it is suspended."""

from __future__ import annotations

import time
from typing import Any

import msgspec

from pinaivu_box import chat_format
from pinaivu_box.backoff import delay
from pinaivu_box.engine.chat_template import INSTEAD, Render, TemplateSetup
from pinaivu_box.engine.messages import LoadModel
from pinaivu_box.engine.own_templates import CHATML
from pinaivu_box.engine.runner import ModelFacts
from pinaivu_box.engine.sandboxes import SandboxRun
from pinaivu_box.errors import ApiError, BadRequest
from pinaivu_box.sandbox import Cancellation, SandboxLimit

_MAX_SOURCE_CHARACTERS = 256 * 1024  # the largest of known models have 20,000
_MAX_TOKEN_BYTES = 256  # the longest are runs of spaces
_MAX_PROMPT_CHARACTERS = 32 << 20
# A template that reaches its limits on so little is at fault itself, not the messages.
_SMALL_REQUEST_BYTES = 64 * 1024
_MAX_FAILURES = 3
_SUSPEND_SECONDS, _MAX_SUSPEND_SECONDS = 30.0, 3600.0


class SandboxedTemplate:
    """A model's chat template.

    `style` and `thinks` say how the model writes (see `chat_format`).  A template that cannot be
    used, or that there is none, refuses chats; all else that the model can do works.
    """

    def __init__(self, run: SandboxRun, facts: ModelFacts, load: LoadModel) -> None:
        self._run = run
        self._model = f"model '{load.model}'" if load.model else "the model's file"
        source = facts.chat_template
        setup = TemplateSetup(
            source or "",
            facts.bos,
            facts.eos,
            min(facts.context * _MAX_TOKEN_BYTES, _MAX_PROMPT_CHARACTERS),
            self._model,
            [] if load.parse_special else list(facts.controls),
        )
        self._setup = msgspec.msgpack.encode(setup)
        self._failures = 0
        self._suspended_until = 0.0
        self._unusable = ""
        self.style = chat_format.TAGS
        self.thinks = False
        if source is None:
            self._unusable = (
                f"{self._model[0].upper()}{self._model[1:]} has no chat template, and its family "
                "is none that this box knows: set `template` for it in the configuration, or use "
                "completions, which need no template."
            )
        elif source != CHATML:  # which knows no tools: the sandbox need not be asked
            self._examine(source)

    def _examine(self, source: str) -> None:
        if len(source) > _MAX_SOURCE_CHARACTERS:
            self._unusable = self._sentence(
                f"is longer than {_MAX_SOURCE_CHARACTERS} characters{INSTEAD}"
            )
            return
        try:
            knows_tools = bool(self._run(msgspec.msgpack.encode(Render(self._setup)), None))
        except SandboxLimit as error:
            self._unusable = self._sentence(f"{error.reason} to be read{INSTEAD}")
            return
        except ApiError as error:
            self._unusable = error.message
            return
        self.thinks = chat_format.THOUGHT in source
        if knows_tools:
            self.style = chat_format.style_of(source)

    def parts(
        self,
        messages: list[dict[str, Any]],
        functions: str | None,
        variables: dict[str, Any],
        cancellation: Cancellation | None = None,
    ) -> list[str]:
        """The prompt in parts: every other one, from the second on, is plain text.  `functions` is
        JSON text of a list.  Raises BadRequest if the template raises, or cannot be used;
        ContextOverflow if it has more characters than the context has room for,
        SandboxCancelled."""
        self._check()
        payload = msgspec.msgpack.encode(Render(self._setup, messages, functions, variables))
        try:
            parts = self._run(payload, cancellation)
        except SandboxLimit as error:
            if len(payload) - len(self._setup) < _SMALL_REQUEST_BYTES:
                self._count_failure()
            raise BadRequest(
                self._sentence(f"{error.reason} for these messages: shorten them"),
                param="messages",
            ) from None
        self._failures = 0
        return msgspec.msgpack.decode(parts, type=list[str])

    def _count_failure(self) -> None:
        self._failures += 1
        if (failures := self._failures - _MAX_FAILURES + 1) > 0:
            seconds = delay(failures, _SUSPEND_SECONDS, _MAX_SUSPEND_SECONDS)
            self._suspended_until = time.monotonic() + seconds

    def _check(self) -> None:
        if self._unusable:
            raise BadRequest(self._unusable, param="messages")
        seconds = self._suspended_until - time.monotonic()
        if seconds > 0:
            times = f"has reached its limits {self._failures} times in a row"
            why = self._sentence(f"{times} and is not run for the next {seconds:.0f} s{INSTEAD}")
            raise BadRequest(why, param="messages")

    def _sentence(self, predicate: str) -> str:
        return f"The chat template of {self._model} {predicate}."
