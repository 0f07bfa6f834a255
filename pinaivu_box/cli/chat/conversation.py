"""A chat with a model: what was said, and the next answer."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pinaivu_box.cli.call import Call
from pinaivu_box.cli.chat import images
from pinaivu_box.cli.chat.answers import Ended, KeyRefused, Piece, ask
from pinaivu_box.cli.chat.printer import Printer
from pinaivu_box.cli.chat.server import ChatServer, key_of
from pinaivu_box.cli.chat.settings import TerminalSettings
from pinaivu_box.errors import NotRunning

Note = Callable[[str], None]


class TerminalConversation:
    """`note` prints what is not part of an answer."""

    def __init__(
        self, call: Call, server: ChatServer, model: str, settings: TerminalSettings, note: Note
    ) -> None:
        self.call, self.model, self.settings = call, model, settings
        self._server, self._note = server, note
        self._messages: list[dict[str, Any]] = []

    def clear(self) -> None:
        """Forget what was said."""
        self._messages.clear()

    def say(self, text: str, printer: Printer) -> None:
        """Send a message and print the answer.  On KeyboardInterrupt the answer ends there, and is
        remembered as far as it came.  Raises CliError; then nothing was said."""
        content, files = images.content_of(text)
        self._announce(files)
        self._messages.append({"role": "user", "content": content})
        began, said = time.monotonic(), ""
        try:
            for piece in self._answer():
                if isinstance(piece, Ended):
                    printer.end()
                    self._report(piece, time.monotonic() - began)
                elif piece.kind == "reasoning":
                    printer.reasoning(piece.text)
                else:
                    said += piece.text
                    printer.text(piece.text)
        except KeyboardInterrupt:
            self._remember(said)
            raise
        except Exception:
            self._messages.pop()
            raise
        self._remember(said)

    def _remember(self, said: str) -> None:
        self._messages.append({"role": "assistant", "content": said})

    def _answer(self) -> Iterator[Piece | Ended]:
        """Raises CliError."""
        system = [{"role": "system", "content": self.settings.system}]
        messages = [*(system if self.settings.system else ()), *self._messages]
        body = {"model": self.model, "messages": messages, **self.settings.fields()}
        try:
            yield from ask(self.call.home, self._server.url(), key_of(self.call), body)
        except KeyRefused:  # it was revoked, or the home's database is another one
            yield from ask(self.call.home, self._server.url(), key_of(self.call, new=True), body)
        except NotRunning:  # the server has ended since
            yield from ask(self.call.home, self._server.url(), key_of(self.call), body)

    def _announce(self, files: list[Path]) -> None:
        for file in files:
            self._note(f"Added image {file}")

    def _report(self, end: Ended, seconds: float) -> None:
        if end.reason == "length":
            self._note("(The answer was cut off: max_tokens, or the context is full.)")
        if self.settings.verbose:
            speed = end.completion_tokens / seconds if seconds else 0.0
            self._note(
                f"{end.prompt_tokens} + {end.completion_tokens} tokens in {seconds:.1f} s "
                f"({speed:.1f} tokens/s); receipt: {end.request_id}"
            )
