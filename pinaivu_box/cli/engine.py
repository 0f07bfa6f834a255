"""`pinaivu engine`: what the box starts as its child; not for people."""

from __future__ import annotations

import click


@click.command(hidden=True)
def engine() -> None:
    from pinaivu_box.engine.worker import main

    main()
