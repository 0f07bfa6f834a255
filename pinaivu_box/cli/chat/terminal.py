"""A chat with somebody at a terminal: lines with history, and commands."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import click

from pinaivu_box.cli import show
from pinaivu_box.cli.chat import images
from pinaivu_box.cli.chat.conversation import TerminalConversation
from pinaivu_box.cli.chat.printer import Printer
from pinaivu_box.errors import BoxError, UsageError

# Reads a line after a prompt; raises EOFError, KeyboardInterrupt.
LineReader = Callable[[str], str]

_QUOTES = '"""'  # begins and ends a text of several lines
_HISTORY_FILE = "chat_history"
_MAX_HISTORY_BYTES = 1_000_000
_PROMPT, _MORE = ">>> ", "... "
_HELP = f"""\
/set              list what can be set
/set NAME VALUE   set it: system, temperature, seed, ...; 'none' resets it
/show             show what is known of the model; /show license: its licence
/clear            forget what was said
/bye              end (Ctrl-D too)

{_QUOTES} begins and ends a message of several lines.  Ctrl-C stops an answer.
The path of an image file in a message sends the image to models that see."""


class _Bye(Exception):
    """The chat ends."""


def chat(conversation: TerminalConversation, read_line: LineReader) -> None:
    """Answer messages and run commands until the end."""
    while True:
        try:
            _take(_read(read_line).strip(), conversation)
        except _Bye:
            return
        except EOFError:
            click.echo()
            return
        except KeyboardInterrupt:
            click.echo("Ctrl-D or /bye ends the chat.")
        except BoxError as error:
            click.echo(f"pinaivu: {error.message}", err=True)


def _take(text: str, conversation: TerminalConversation) -> None:
    """Raises _Bye, CliError."""
    if text.startswith("/") and not images.begins_with_file(text):
        _command(text, conversation)
    elif text:
        _say(text, conversation)


def _read(read_line: LineReader) -> str:
    """A message: a line, or several between quotes.  Raises EOFError, KeyboardInterrupt."""
    text = read_line(_PROMPT)
    if text.count(_QUOTES) % 2:
        while True:
            line = read_line(_MORE)
            text += f"\n{line}"
            if _QUOTES in line:
                break
    return text.replace(_QUOTES, "")


def _say(text: str, conversation: TerminalConversation) -> None:
    """Raises CliError."""
    printer = printer_of_stdout()
    try:
        conversation.say(text, printer)
    except KeyboardInterrupt:
        pass
    finally:
        printer.end()
    click.echo()


def printer_of_stdout() -> Printer:
    width = os.get_terminal_size(1).columns or 80 if sys.stdout.isatty() else None
    return Printer(sys.stdout, width)


def _command(text: str, conversation: TerminalConversation) -> None:
    """Raises _Bye, CliError."""
    name, _, rest = text.partition(" ")
    words = rest.split(maxsplit=1)
    match name:
        case "/bye" | "/exit" | "/quit":
            raise _Bye
        case "/clear":
            conversation.clear()
            click.echo("Forgotten.")
        case "/show":
            _show(words, conversation)
        case "/set":
            _set(words, conversation)
        case "/help" | "/?":
            click.echo(_HELP)
        case _:
            raise UsageError(f"There is no command {name}: /help lists them.")


def _show(words: Iterable[str], conversation: TerminalConversation) -> None:
    described = show.description_of(conversation.call, conversation.model)
    if [*words] == ["license"]:
        click.echo(show.license_text(described))
    else:
        show.print_description(described)


def _set(words: list[str], conversation: TerminalConversation) -> None:
    """Raises UsageError."""
    if words and words[0] == "parameter":  # as in Ollama
        words = words[1].split(maxsplit=1) if len(words) > 1 else []
    if not words:
        click.echo("\n".join(conversation.settings.lines()))
        return
    if len(words) == 1:
        raise UsageError(f"/set {words[0]} needs a value; 'none' resets it.")
    conversation.settings.set(words[0], words[1].strip())


def line_reader(home: Path) -> LineReader:
    """Lines with editing and a history, which only the user can read."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import FileHistory

    session: PromptSession[str] = PromptSession(history=FileHistory(str(_history_file(home))))
    return lambda prompt: session.prompt(prompt)


def _history_file(home: Path) -> Path:
    path = home / _HISTORY_FILE
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600))
    if path.stat().st_size > _MAX_HISTORY_BYTES:  # keep the newer half, from an entry on
        data = path.read_bytes()[-_MAX_HISTORY_BYTES // 2 :]
        path.write_bytes(data[data.find(b"\n# ") + 1 :])
    return path
