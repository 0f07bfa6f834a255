"""`pinaivu run`: a chat in the terminal, or one answer."""

from __future__ import annotations

import sys
from typing import Any

import click

from pinaivu_box.cli import suggestions
from pinaivu_box.cli.call import Call
from pinaivu_box.cli.chat.conversation import TerminalConversation
from pinaivu_box.cli.chat.server import ChatServer, key_of
from pinaivu_box.cli.chat.settings import TerminalSettings
from pinaivu_box.cli.chat.terminal import chat, line_reader, printer_of_stdout
from pinaivu_box.cli.options import standard_options
from pinaivu_box.cli.pull import pulled, reference_of
from pinaivu_box.errors import CliError, UsageError
from pinaivu_box.models import known_models
from pinaivu_box.text import megabytes
from pinaivu_box.tls.pinned import context_for


@click.command()
@standard_options(json=False, config=True)
@click.argument("model", shell_complete=suggestions.models)
@click.argument("prompt", nargs=-1)
@click.option(
    "--set",
    "assignments",
    metavar="NAME=VALUE",
    multiple=True,
    help="As /set in the chat: system, temperature, seed, ...  Repeatable.",
)
@click.option("--yes", is_flag=True, help="Pull the model without a question if it is not here.")
def run(
    call: Call, model: str, prompt: tuple[str, ...], assignments: tuple[str, ...], yes: bool
) -> None:
    """Chat with MODEL; with a PROMPT, print one answer.

    A text that is piped in is added to the PROMPT: cat x | pinaivu run MODEL "summarise".  A model
    that is not here is pulled, after a question.  In the chat, /help lists the commands, and Ctrl-C
    stops an answer.

    If no box runs on this home, one runs for the time of the chat.  Requests are those of the key
    "pinaivu run", which is made when it is first needed.
    """
    call = Call(call.home.expanduser().absolute(), call.config_file and call.config_file.absolute())
    settings = _settings(assignments)
    text = _text(prompt)
    if text is None and not sys.stdout.isatty():
        raise UsageError("A chat needs a terminal: write a PROMPT, or pipe one in.")
    with ChatServer(call) as server:
        model_id = _model_here(call, server, model, yes=yes)
        conversation = TerminalConversation(call, server, model_id, settings, _note)
        if text is None:
            chat(conversation, line_reader(call.home))
            return
        printer = printer_of_stdout()
        try:
            conversation.say(text, printer)
        finally:
            printer.end()


def _note(text: str) -> None:
    click.echo(click.style(text, dim=True) if sys.stderr.isatty() else text, err=True)


def _settings(assignments: tuple[str, ...]) -> TerminalSettings:
    """Raises UsageError."""
    settings = TerminalSettings()
    for assignment in assignments:
        name, separator, value = assignment.partition("=")
        if not separator:
            raise UsageError(f"--set {assignment} is not NAME=VALUE, such as temperature=0.5.")
        settings.set(name, value)
    return settings


def _text(prompt: tuple[str, ...]) -> str | None:
    """What to ask; None for a chat.  Raises UsageError."""
    asked = " ".join(prompt)
    if sys.stdin.isatty():
        return asked or None
    piped = sys.stdin.buffer.read().decode(errors="replace").strip()
    if not asked and not piped:
        raise UsageError("There is nothing to answer: write a PROMPT, or pipe a text in.")
    return "\n\n".join(filter(None, (asked, piped)))


def _model_here(call: Call, server: ChatServer, model: str, *, yes: bool) -> str:
    """The id of the model, pulled if need be.  Raises CliError, Abort."""
    if (model_id := _served(call, server.url(), model)) is not None:
        return model_id
    if not yes:
        _confirm_pull(model)
    last = pulled(call, {"model": reference_of(model)})
    return str(last["model"])


def _served(call: Call, url: str, model: str, *, key: str = "") -> str | None:
    """The id of a model that the box serves, None if it does not.  Raises CliError."""
    from urllib.parse import quote

    import httpx

    answer: Any = httpx.get(
        f"{url}/v1/models/{quote(model)}",
        headers={"Authorization": f"Bearer {key or key_of(call)}"},
        timeout=30,
        trust_env=False,
        verify=context_for(call.home, url),
    )
    if answer.status_code == 401 and not key:
        return _served(call, url, model, key=key_of(call, new=True))
    if answer.is_success:
        return str(answer.json()["id"])
    if answer.status_code == 404:
        return None
    raise CliError(answer.json()["error"]["message"])


def _confirm_pull(model: str) -> None:
    """Raises CliError if nobody can be asked, Abort."""
    if not sys.stdin.isatty():
        raise CliError(
            f"{model} is not on this box, and nobody can be asked here: 'pinaivu pull {model}' "
            "downloads it, and so does --yes."
        )
    known = known_models.known(model)
    about = f" ({megabytes(known.size)}, {known.license})" if known is not None else ""
    click.confirm(
        f"{model} is not on this box. Pull it{about}?", default=True, abort=True, err=True
    )
