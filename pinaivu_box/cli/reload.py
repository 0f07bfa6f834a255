"""`pinaivu reload`: the running box takes over its configuration file and its models anew."""

from __future__ import annotations

from pathlib import Path

import click

from pinaivu_box.cli.home import ask_running, home_option, json_option, print_json

_SECONDS = 300.0
_TOLD = {
    "applied": "holds now",
    "engines": "holds for engines that start from now on",
    "restart": "holds when the box is started anew",
}


@click.command()
@home_option
@json_option
def reload(home: Path, as_json: bool) -> None:
    """Let the running box read its configuration again; no request is dropped."""
    # Many large headers are many seconds of work.
    done = ask_running(home, "/v1/admin/reload", method="POST", seconds=_SECONDS)
    if as_json:
        print_json(done)
        return
    for kind, meaning in _TOLD.items():
        for name in done[kind]:
            click.echo(f"{name} {meaning}")
    if not any(done[kind] for kind in _TOLD):
        click.echo("no setting has changed")
    click.echo(f"models: {', '.join(done['models']) or 'none'}")
    for file in done["not_served"]:
        click.echo(f"not served: {file['path']}: {file['reason']}", err=True)
