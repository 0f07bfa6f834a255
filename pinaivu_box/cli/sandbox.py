"""`pinaivu sandbox`: the child process that runs jobs within limits; started by the box only."""

from __future__ import annotations

import click


@click.command(hidden=True)
def sandbox() -> None:
    from pinaivu_box.sandbox import main

    main()
