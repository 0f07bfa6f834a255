"""`pinaivu engine` and `pinaivu sandbox`: child processes, which only the box starts."""

from __future__ import annotations

import click


@click.command(hidden=True)
def engine() -> None:
    """Run a model."""
    from pinaivu_box.engine.worker import main

    main()


@click.command(hidden=True)
def sandbox() -> None:
    """Run jobs within limits."""
    from pinaivu_box.sandbox import main

    main()
