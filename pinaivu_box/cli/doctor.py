"""`pinaivu doctor`."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click

from pinaivu_box.cli.home import load_config
from pinaivu_box.cli.options import standard_options
from pinaivu_box.cli.render import print_checks, print_json


@click.command()
@standard_options(config=True)
def doctor(home: Path, config: Path | None, as_json: bool) -> None:
    """Check the box and its machine, and suggest what to do.

    The server may be running.  Nothing is changed.  Model files are read completely.  Exits with 1
    if a check failed.
    """
    from rich.console import Console

    from pinaivu_box.doctor.examine import examine

    # The checks say all there is to say.
    logging.getLogger("pinaivu").addHandler(logging.NullHandler())
    home = home.expanduser().absolute()
    load = partial(load_config, home, config)
    with Console(stderr=True).status("") as status:
        checks = list(examine(home, load, lambda name: status.update(f"checking: {name}")))
    report(checks, as_json=as_json)


def report(checks: Sequence[Any], *, as_json: bool) -> None:
    """Print checks (`doctor.check.Check`); exit with 1 if one failed."""
    if as_json:
        print_json(checks)
    else:
        print_checks(checks)
    if any(check.state == "failed" for check in checks):
        sys.exit(1)
