"""`pinaivu doctor`."""

from __future__ import annotations

import logging
import sys
from functools import partial
from pathlib import Path
from typing import Any

import click

from pinaivu_box.cli.home import config_option, home_option, json_option, load_config, print_json

_COLOURS = {"ok": "green", "warning": "yellow", "failed": "bold red"}


@click.command()
@home_option
@config_option
@json_option
def doctor(home: Path, config: Path | None, as_json: bool) -> None:
    """Check the box and its machine, and say what to do; exit 1 if a check failed.

    The server may be running.  Nothing is changed.  Model files are read whole.
    """
    from rich.console import Console

    from pinaivu_box.doctor.examine import examine

    # What the checks say is all there is to say.
    logging.getLogger("pinaivu").addHandler(logging.NullHandler())
    home = home.expanduser().absolute()
    load = partial(load_config, home, config)
    errors = Console(stderr=True)
    with errors.status("") as status:
        checks = list(examine(home, load, lambda name: status.update(f"checking: {name}")))
    if as_json:
        print_json(checks)
    else:
        show_checks(checks)
    if any(check.state == "failed" for check in checks):
        sys.exit(1)


def show_checks(checks: list[Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column()
    table.add_column()
    table.add_column(overflow="fold")  # a long path is not cut off: its end says which file it is
    name = ""
    for check in checks:
        found = Text(check.found)
        if check.todo:
            found.append(f"\n→ {check.todo}", style="bold")
        state = Text(check.state.upper() if check.state == "failed" else check.state)
        state.stylize(_COLOURS[check.state])
        table.add_row(state, "" if check.name == name else check.name, found)
        name = check.name
    Console(width=None if sys.stdout.isatty() else 1000).print(table)
