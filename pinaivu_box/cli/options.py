"""Options that several commands share, and how their values are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from pinaivu_box.config import default_home, parse_span
from pinaivu_box.errors import UsageError

MAX_LIMIT = 2**31  # items of a list
NONE = "none"  # the value that resets a setting to its default
Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def _complete_restore(_context: click.Context, _parameter: click.Parameter, home: Path) -> Path:
    """Finish a restore that was interrupted, before anything in the home is read."""
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


home_option: Decorator = click.option(
    "--home",
    type=click.Path(path_type=Path, file_okay=False),
    default=default_home,
    show_default=False,
    callback=_complete_restore,
    help="Data directory.  [env: PINAIVU_HOME]",
)
config_option: Decorator = click.option(
    "--config",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Configuration file.  [default: HOME/config.toml]",
)
json_option: Decorator = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
wide_option: Decorator = click.option("--wide", is_flag=True, help="Print all columns in full.")


def standard_options(*, config: bool = False, wide: bool = False) -> Decorator:
    """Add --home and --json, and if requested --config and --wide."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        command = json_option(wide_option(command) if wide else command)
        return home_option(config_option(command) if config else command)

    return decorate


def span(option: str, text: str) -> float:
    """The seconds of a duration with a unit.  Raises UsageError."""
    try:
        return parse_span(text)
    except ValueError as error:
        raise UsageError(f"{option}: {error}.") from error


def settings(
    values: Mapping[str, Any],
    parsers: Mapping[str, Callable[[Any], Any]],
    option_of: Callable[[str], str],
) -> dict[str, Any]:
    """The settings that were given on the command line, as in JSON: null for 'none'.

    `parsers` read those that are not text; they raise ValueError with a clause.

    Raises UsageError.
    """
    return {
        name: _setting(name, value, parsers, option_of)
        for name, value in values.items()
        if value not in (None, ())
    }


def _setting(
    name: str,
    value: Any,
    parsers: Mapping[str, Callable[[Any], Any]],
    option_of: Callable[[str], str],
) -> Any:
    if value in (NONE, (NONE,)):
        return None
    try:
        if name in parsers:
            return parsers[name](value)
    except ValueError as error:
        raise UsageError(f"{option_of(name)}: {error}.") from error
    return list(value) if isinstance(value, tuple) else value


def whole_number(text: str) -> int:
    """Raises ValueError."""
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"'{text}' is not a whole number") from None


def limit_of(all_: bool) -> int:
    """How many items `ls` lists, with `--all` or without."""
    return MAX_LIMIT if all_ else 100
