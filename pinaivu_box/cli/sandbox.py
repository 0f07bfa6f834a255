"""`pinaivu sandbox`: a child that runs jobs within limits; not for people."""

from __future__ import annotations

import click


@click.command(hidden=True)
def sandbox() -> None:
    from pinaivu_box.sandbox import main

    main()
