"""The model's chat template, run in a sandbox; what it may cost, and when it is left alone."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import msgspec

from pinaivu_box import chat_format
from pinaivu_box.engine.chat_template import CHATML, INSTEAD, Render
from pinaivu_box.engine.sandboxes import SandboxRun, reached
from pinaivu_box.errors import ApiError, BadRequest
from pinaivu_box.sandbox import Cancellation, SandboxLimit

_LONGEST_SOURCE = 256 * 1024  # characters; the largest of known models have 20,000
_LONGEST_PIECE = 256  # bytes of a token; the longest are runs of spaces
_LONGEST_PROMPT = 32 << 20
# A template that reaches its limits on so little is at fault itself, and not who sends messages.
_SMALL = 64 * 1024  # bytes
_STRIKES = 3
_REST_SECONDS, _LONGEST_REST = 30.0, 3600.0


class SandboxedTemplate:
    """`source` is the template of the GGUF file, None if it has none.

    `style` and `thinks` say how the model writes (see `chat_format`), `model` names it in errors.
    `controls` are the control tokens that nobody but the template can write (see `control_tokens`).
    A template that cannot be used refuses chats; all else that the model can do works.
    """

    def __init__(
        self,
        run: SandboxRun,
        source: str | None,
        *,
        bos: str,
        eos: str,
        context: int,
        model: str = "",
        controls: Sequence[str] = (),
    ) -> None:
        trusted = source is None
        source = source or CHATML
        self._run = run
        self._whose = f"model '{model}'" if model else "the model's file"
        most = min(context * _LONGEST_PIECE, _LONGEST_PROMPT)
        self._asked = Render(
            source, bos, eos, most=most, whose=self._whose, controls=list(controls)
        )
        self._size = len(msgspec.msgpack.encode(self._asked))
        self._strikes = 0
        self._rests_until = 0.0
        self._unusable = ""
        self.style = chat_format.TAGS
        self.thinks = False
        if trusted:
            return  # it knows no tools, and nobody waits until that is asked
        if len(source) > _LONGEST_SOURCE:
            self._unusable = self._sentence(f"is longer than {_LONGEST_SOURCE} characters{INSTEAD}")
            return
        try:
            knows_tools = bool(run(msgspec.msgpack.encode(self._asked)))
        except SandboxLimit as error:
            self._unusable = self._sentence(f"{reached(error.limit)} to be read{INSTEAD}")
            return
        except ApiError as error:
            self._unusable = error.message
            return
        self.thinks = chat_format.thinks(source)
        if knows_tools:
            self.style = chat_format.style_of(source)

    def render(
        self,
        messages: list[dict[str, Any]],
        functions: str | None = None,
        variables: dict[str, Any] | None = None,
    ) -> str:
        """The prompt; see `parts`."""
        return "".join(self.parts(messages, functions, variables))

    def parts(
        self,
        messages: list[dict[str, Any]],
        functions: str | None = None,
        variables: dict[str, Any] | None = None,
        *,
        tenant: str = "",
        cancellation: Cancellation | None = None,
    ) -> list[str]:
        """The prompt in parts: every other one, from the second on, is plain text.  `functions` is
        JSON text of a list.  Raises BadRequest if the template objects, or cannot be used;
        ContextOverflow if it has more characters than the context has room for,
        SandboxCancelled."""
        self._check()
        asked = msgspec.structs.replace(
            self._asked, messages=messages, functions=functions, variables=variables or {}
        )
        payload = msgspec.msgpack.encode(asked)
        try:
            made = self._run(payload, tenant=tenant, cancellation=cancellation)
        except SandboxLimit as error:
            if len(payload) - self._size < _SMALL:
                self._strike()
            raise BadRequest(
                self._sentence(f"{reached(error.limit)} for these messages: shorten them"),
                param="messages",
            ) from None
        self._strikes = 0
        return msgspec.msgpack.decode(made, type=list[str])

    def _strike(self) -> None:
        self._strikes += 1
        if (more := self._strikes - _STRIKES) >= 0:
            rest = min(_REST_SECONDS * 2 ** min(more, 16), _LONGEST_REST)
            self._rests_until = time.monotonic() + rest

    def _check(self) -> None:
        if self._unusable:
            raise BadRequest(self._unusable, param="messages")
        rest = self._rests_until - time.monotonic()
        if rest > 0:
            times = f"has reached its limits {self._strikes} times in a row"
            why = self._sentence(f"{times} and is not run for the next {rest:.0f} s{INSTEAD}")
            raise BadRequest(why, param="messages")

    def _sentence(self, what: str) -> str:
        return f"The chat template of {self._whose} {what}."
