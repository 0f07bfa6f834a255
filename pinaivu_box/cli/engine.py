"""`pinaivu engine`: the child process that runs a model; started by the box only."""

from __future__ import annotations

import click


@click.command(hidden=True)
def engine() -> None:
    from pinaivu_box.engine.worker import main

    main()
