"""Log lines as text or JSON, to standard error or the journal; they never contain a key, a prompt
or an answer."""

from __future__ import annotations

import json
import logging
import sys
from typing import Any

import msgspec

from pinaivu_box.config import LogConfig
from pinaivu_box.errors import quoted
from pinaivu_box.systemd.journal import JournalHandler, is_journal
from pinaivu_box.terminal_log import TerminalFormatter
from pinaivu_box.text import utc_text

_MAX_VALUE_CHARS = 400
_MAX_MESSAGE_CHARS = 4000


class _MessageFormatter(logging.Formatter):
    """The message with its fields: the journal knows time and level."""

    def format(self, record: logging.LogRecord) -> str:
        fields = getattr(record, "fields", {}).items()
        pairs = "".join(f" {name}={_shown(value)}" for name, value in fields if value is not None)
        line = f"{quoted(record.getMessage(), _MAX_MESSAGE_CHARS)}{pairs}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class _TextFormatter(_MessageFormatter):
    def format(self, record: logging.LogRecord) -> str:
        level = record.levelname.lower()
        return f"{utc_text(record.created)} {level:7} {super().format(record)}"


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": utc_text(record.created),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line).decode()


def _shown(value: Any) -> str:
    """A value, which may come from a client: in one line without control characters, and quoted if
    it could be taken for another field."""
    text = str(value)
    if not text.isprintable() or any(mark in text for mark in ' "='):
        text = json.dumps(text, ensure_ascii=False)
    return quoted(text, _MAX_VALUE_CHARS)


def configure(config: LogConfig) -> None:
    """Log to stderr, or with fields to the journal if that reads it; stdout is for the output of
    commands."""
    handler: logging.Handler = logging.StreamHandler(sys.stderr)
    text: logging.Formatter = _TextFormatter()
    if is_journal(2):
        handler, text = JournalHandler(), _MessageFormatter()
    elif sys.stderr.isatty():
        text = TerminalFormatter()
    handler.setFormatter(_JsonFormatter() if config.format == "json" else text)
    logging.basicConfig(level=config.level.upper(), handlers=[handler], force=True)
    # At debug, aiosqlite logs each statement and asyncio each slow callback; httpx each request.
    for noisy in ("aiosqlite", "httpx", "httpcore"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    # Of clients that have left, it warns "socket.send() raised exception".
    logging.getLogger("asyncio").setLevel(logging.ERROR)
