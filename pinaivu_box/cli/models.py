"""`pinaivu cp`, `set`, `rm` and `stop`: names, settings, files and engines of models."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

import click

from pinaivu_box.cli import suggestions
from pinaivu_box.cli.call import Call
from pinaivu_box.cli.client import request, request_or_open
from pinaivu_box.cli.options import standard_options
from pinaivu_box.cli.render import print_json
from pinaivu_box.cli.show import description_of
from pinaivu_box.errors import BoxError, UsageError
from pinaivu_box.text import megabytes, number

_PATH = "/v1/admin/models"
_UNLOAD_SECONDS = 60.0  # an engine that does not end is killed before
_SAMPLING = ("temperature", "top_p", "top_k", "min_p")
_NUMBERS = ("context", "parallel", "top_k", "gpu_layers")
_FRACTIONS = ("temperature", "top_p", "min_p")
_SWITCHES = ("pin", "preload")
_NAMES = (*_SAMPLING, "context", "parallel", "keep_alive", "kv_type", "gpu_layers", *_SWITCHES)
_WORDS = {"yes": True, "true": True, "on": True, "no": False, "false": False, "off": False}
_names_argument = click.argument(
    "names", nargs=-1, shell_complete=suggestions.models, required=True, metavar="NAME..."
)


def _asked(call: Call, action: str, body: dict[str, Any]) -> dict[str, Any]:
    """The answer of the box to what is to be done with models, whether or not it runs."""
    path = f"{_PATH}/{action}"
    answer: dict[str, Any] = request_or_open(call, path, method="POST", body=body, peering=False)
    answer.pop("request_id", None)
    return answer


def _print_each(
    call: Call,
    names: tuple[str, ...],
    ask: Callable[[str], dict[str, Any]],
    print_text: Callable[[Mapping[str, Any]], None],
) -> None:
    """Ask for each name; text is printed after each, JSON at the end."""
    answers = []
    for name in names:
        answers.append(ask(name))
        if not call.as_json:
            print_text(answers[-1])
    if call.as_json:
        print_json(answers)


@click.command()
@standard_options(config=True)
@click.argument("model", shell_complete=suggestions.models)
@click.argument("alias")
def cp(call: Call, model: str, alias: str) -> None:
    """Make ALIAS another name of MODEL; nothing is copied.

    Requests may ask for either; answers and receipts name the model.  A key that is limited to
    certain models may use an alias if it may use its model.  'pinaivu rm ALIAS' removes it.
    """
    body = {"source": model, "destination": alias}
    call.print(_asked(call, "copy", body), _print_alias)


def _print_alias(made: dict[str, Any]) -> None:
    click.echo(f"{made['alias']} is an alias of {made['model']}.")


@click.command("set")
@standard_options(config=True)
@click.argument("model", shell_complete=suggestions.models)
@click.argument("settings", nargs=-1, metavar="[NAME=VALUE]...")
@click.option("--reset", is_flag=True, help="Reset all other settings of the model.")
def set_(call: Call, model: str, settings: tuple[str, ...], reset: bool) -> None:
    """Set defaults of MODEL: they count before the configuration, until they are reset.

    \b
    temperature, top_p, top_k, min_p  for requests that do not say
    keep_alive                        how long it stays loaded, as in 30m
    pin, preload                      yes or no
    context, parallel                 tokens of a request; requests at the same time
    kv_type, gpu_layers               as in the configuration

    NAME= resets a setting.  The last four count once the model is loaded again.  'pinaivu show
    MODEL' shows what is in force.
    """
    if not settings and not reset:
        raise UsageError("Nothing to set: write NAME=VALUE, or --reset.")
    body = {"model": model, "settings": _parsed(settings), "reset": reset}
    call.print(_asked(call, "set", body), _print_settings)


def _parsed(settings: tuple[str, ...]) -> dict[str, Any]:
    """As the endpoint takes them.  Raises UsageError."""
    changes: dict[str, Any] = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals or name not in _NAMES:
            raise UsageError(f"'{setting}' is no NAME=VALUE with one of: {', '.join(_NAMES)}.")
        value = _value(name, text.strip()) if text.strip() else None
        place = changes.setdefault("sampling", {}) if name in _SAMPLING else changes
        place[name] = value
    return changes


def _value(name: str, text: str) -> Any:
    """Raises UsageError."""
    try:
        if name in _SWITCHES:
            return _WORDS[text.lower()]
        if name in _FRACTIONS:
            return float(text)
    except (KeyError, ValueError):
        kind = "yes or no" if name in _SWITCHES else "a number"
        raise UsageError(f"{name} is '{text}', not {kind}.") from None
    if name not in _NUMBERS or text == "auto":
        return text
    if (value := number(text)) is None:
        raise UsageError(f"{name} is '{text}', not a whole number.")
    return value


def _print_settings(answer: dict[str, Any]) -> None:
    set_here = dict(answer["overrides"])
    set_here |= set_here.pop("sampling", {})
    shown = ", ".join(f"{name} {_shown(value)}" for name, value in set_here.items())
    click.echo(f"{answer['model']}: {shown or 'all is as configured'}")
    if answer["reload"]:
        names = ", ".join(answer["reload"])
        click.echo(
            f"{names}: once it is loaded again ('pinaivu stop {answer['model']}').", err=True
        )


def _shown(value: Any) -> str:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


@click.command()
@standard_options(config=True)
@_names_argument
@click.option("--yes", is_flag=True, help="Do not ask.")
def rm(call: Call, names: tuple[str, ...], yes: bool) -> None:
    """Delete models from the models folder, or aliases.

    A model is unloaded first: requests that run finish, and the disk space is free after them.  Of
    a file that 'pinaivu pull PATH' linked, the link is deleted and the file stays.
    """
    if not yes:
        _confirm(call, names)
    _print_each(call, names, lambda name: _asked(call, "delete", {"model": name}), _print_removed)


def _confirm(call: Call, names: tuple[str, ...]) -> None:
    """Raises UsageError, Abort."""
    if not sys.stdin.isatty():
        raise UsageError("Nobody can be asked here: add --yes to delete without a question.")
    for name in names:
        click.echo(_described(call, name), err=True)
    click.confirm("Delete?" if len(names) == 1 else "Delete all of these?", abort=True, err=True)


def _described(call: Call, name: str) -> str:
    """A line about what would be deleted; of what is unknown, the name."""
    try:
        model = description_of(call, name)
    except BoxError:
        return name
    if name in model["aliases"]:
        return f"{name}  (an alias of {model['model']}, which stays)"
    return f"{model['model']}  ({megabytes(model['size'])})"


def _print_removed(removed: Mapping[str, Any]) -> None:
    name = removed["model"]
    if removed["alias_of"]:
        click.echo(f"{name} is no alias of {removed['alias_of']} any more.")
        return
    freed = "the file that the link led to stays"
    if not removed["links"]:
        freed = f"{megabytes(removed['size'])} are free"
        if count := removed["running"]:
            freed += f" after {count} {'request that runs' if count == 1 else 'requests that run'}"
    click.echo(f"{name} is deleted: {freed}.")
    for alias in removed["aliases"]:
        click.echo(f"{alias} is an alias of it and leads nowhere now.", err=True)


@click.command()
@standard_options()
@_names_argument
def stop(call: Call, names: tuple[str, ...]) -> None:
    """Unload models from the memory of the running box.

    Requests that run are not cancelled: the model is unloaded after them.  The next request loads
    it again.
    """

    def unload(name: str) -> dict[str, Any]:
        path, body = f"{_PATH}/unload", {"model": name}
        answer: dict[str, Any] = request(
            call.home, path, method="POST", body=body, seconds=_UNLOAD_SECONDS
        )
        answer.pop("request_id", None)
        return answer

    _print_each(call, names, unload, _print_unloaded)


def _print_unloaded(answer: Mapping[str, Any]) -> None:
    name, count = answer["model"], answer["running"]
    if not answer["unloaded"]:
        click.echo(f"{name} is not loaded.")
    elif count:
        requests = "request" if count == 1 else "requests"
        click.echo(f"{name} serves {count} {requests}, and is unloaded after that.")
    else:
        click.echo(f"{name} is unloaded.")
