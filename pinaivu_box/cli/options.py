"""Options that several commands share, and how their values are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import Any

import click

from pinaivu_box.cli.call import Call
from pinaivu_box.config import default_home, parse_span
from pinaivu_box.errors import UsageError

_MAX_LIMIT = 2**31  # items of a list
_LIMIT = 100
NONE = "none"  # the value that resets a setting to its default
Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def _complete_restore(context: click.Context, _parameter: click.Parameter, home: Path) -> Path:
    """Finish a restore that was interrupted, before anything in the home is read."""
    if context.resilient_parsing:  # a shell completes the command: nothing is done yet
        return home
    try:
        interrupted = (home / "restore.ready").is_dir()
    except OSError:  # the command reports what is wrong with the home
        return home
    if interrupted:
        from pinaivu_box.backup.restore import complete

        if previous := complete(home):
            click.echo(
                f"An interrupted restore was completed; the previous files are in {previous}.",
                err=True,
            )
    return home


_home_option: Decorator = click.option(
    "--home",
    type=click.Path(path_type=Path, file_okay=False),
    default=default_home,
    show_default=False,
    callback=_complete_restore,
    help="Data directory.  [env: PINAIVU_HOME]",
)
_config_option: Decorator = click.option(
    "--config",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Configuration file.  [default: HOME/config.toml]",
)
_json_option: Decorator = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
_wide_option: Decorator = click.option("--wide", is_flag=True, help="Print all columns in full.")
limit_option: Decorator = click.option(
    "--limit",
    type=click.IntRange(1, _MAX_LIMIT),
    default=_LIMIT,
    show_default=True,
    help="Maximum number of entries; the newest are listed.",
)


def all_option(text: str) -> Decorator:
    """Add --all, which raises the argument `limit`."""
    return click.option(
        "--all", "limit", flag_value=_MAX_LIMIT, default=_LIMIT, type=int, help=text
    )


def standard_options(
    *, home: bool = True, json: bool = True, config: bool = False, wide: bool = False
) -> Decorator:
    """Add --home, --json, --config and --wide, or those requested; they arrive as a `Call`."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(command)
        def called(
            *arguments: Any,
            home: Path = Path(),
            config: Path | None = None,
            as_json: bool = False,
            wide: bool = False,
            **values: Any,
        ) -> Any:
            return command(*arguments, Call(home, config, as_json, wide), **values)

        decorated: Callable[..., Any] = called
        for wanted, option in (
            (wide, _wide_option),
            (json, _json_option),
            (config, _config_option),
            (home, _home_option),
        ):
            decorated = option(decorated) if wanted else decorated
        return decorated

    return decorate


def span(option: str, text: str) -> float:
    """The seconds of a duration with a unit.  Raises UsageError."""
    try:
        return parse_span(text)
    except ValueError as error:
        raise UsageError(f"{option}: {error}.") from error


def option_of(name: str) -> str:
    """The option of the command that runs that becomes the argument `name`."""
    parameters = click.get_current_context().command.params
    return next((each.opts[0] for each in parameters if each.name == name), name)


def settings(
    values: Mapping[str, Any], parsers: Mapping[str, Callable[[Any], Any]]
) -> dict[str, Any]:
    """The settings among the arguments of a command, as in JSON: null for 'none'.

    `parsers` read those that are not text; they raise ValueError with a clause.

    Raises UsageError.
    """
    given: dict[str, Any] = {}
    for name, value in values.items():
        if value in (None, ()):
            continue
        if value in (NONE, (NONE,)):
            given[name] = None
            continue
        try:
            given[name] = parsers[name](value) if name in parsers else value
        except ValueError as error:
            raise UsageError(f"{option_of(name)}: {error}.") from error
    return given


def whole_number(text: str) -> int:
    """Raises ValueError."""
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"'{text}' is not a whole number") from None
