"""`pinaivu doctor`."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from typing import Any

import click

from pinaivu_box.cli import colours
from pinaivu_box.cli.call import Call
from pinaivu_box.cli.options import standard_options
from pinaivu_box.cli.render import print_checks


@click.command()
@standard_options(config=True)
def doctor(call: Call) -> None:
    """Check the box and its machine, and suggest what to do.

    The server may be running.  Nothing is changed.  Model files are read completely.  Exits with 1
    if a check failed.
    """

    from pinaivu_box.doctor.examine import examine

    # The checks say all there is to say.
    logging.getLogger("pinaivu").addHandler(logging.NullHandler())
    call = call._replace(home=call.home.expanduser().absolute())
    with colours.console(stderr=True).status("") as status:
        checks = list(
            examine(call.home, call.config, lambda name: status.update(f"checking: {name}"))
        )
    report(call, checks)


def report(call: Call, checks: Sequence[Any]) -> None:
    """Print checks (`doctor.check.Check`); exit with 1 if one failed."""
    call.print(checks, print_checks)
    if any(check.state == "failed" for check in checks):
        sys.exit(1)
