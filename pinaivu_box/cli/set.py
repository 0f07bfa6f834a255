"""`pinaivu set`: settings of a model that count before the configuration."""

from __future__ import annotations

from typing import Any

import click

from pinaivu_box.cli import suggestions
from pinaivu_box.cli.call import Call
from pinaivu_box.cli.client import request_or_open
from pinaivu_box.cli.options import standard_options
from pinaivu_box.errors import UsageError
from pinaivu_box.text import number

_SAMPLING = ("temperature", "top_p", "top_k", "min_p")
_NUMBERS = ("context", "parallel", "top_k", "gpu_layers")
_FRACTIONS = ("temperature", "top_p", "min_p")
_SWITCHES = ("pin", "preload")
_NAMES = (*_SAMPLING, "context", "parallel", "keep_alive", "kv_type", "gpu_layers", *_SWITCHES)
_WORDS = {"yes": True, "true": True, "on": True, "no": False, "false": False, "off": False}


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
    answer = request_or_open(call, "/v1/admin/models/set", method="POST", body=body, peering=False)
    answer.pop("request_id", None)
    call.print(answer, _print)


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


def _print(answer: dict[str, Any]) -> None:
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
