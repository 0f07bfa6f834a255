"""`pinaivu rm`: deletes models and aliases."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import click

from pinaivu_box.cli import suggestions
from pinaivu_box.cli.call import Call
from pinaivu_box.cli.client import request_or_open
from pinaivu_box.cli.options import standard_options
from pinaivu_box.cli.show import description_of
from pinaivu_box.errors import BoxError, UsageError
from pinaivu_box.text import megabytes


@click.command()
@standard_options(config=True)
@click.argument(
    "names", nargs=-1, shell_complete=suggestions.models, required=True, metavar="NAME..."
)
@click.option("--yes", is_flag=True, help="Do not ask.")
def rm(call: Call, names: tuple[str, ...], yes: bool) -> None:
    """Delete models from the models folder, or aliases.

    A model is unloaded first: requests that run finish, and the disk space is free after them.  Of
    a file that 'pinaivu pull PATH' linked, the link is deleted and the file stays.
    """
    if not yes:
        _confirm(call, names)
    removed = []
    for name in names:
        answer = request_or_open(
            call, "/v1/admin/models/delete", method="POST", body={"model": name}, peering=False
        )
        answer.pop("request_id", None)
        removed.append(answer)
        if not call.as_json:
            _print(answer)
    if call.as_json:
        call.print(removed, _print)


def _confirm(call: Call, names: tuple[str, ...]) -> None:
    """Raises UsageError, Abort."""
    if not sys.stdin.isatty():
        raise UsageError("Nobody can be asked here: add --yes to delete without a question.")
    for name in names:
        click.echo(_described(call, name), err=True)
    click.confirm("Delete?" if len(names) == 1 else "Delete all of these?", abort=True, err=True)


def _described(call: Call, name: str) -> str:
    """A line about what would be deleted; of what is unknown, the name."""
    try:
        model = description_of(call, name)
    except BoxError:
        return name
    if name in model["aliases"]:
        return f"{name}  (an alias of {model['model']}, which stays)"
    return f"{model['model']}  ({megabytes(model['size'])})"


def _print(removed: Mapping[str, Any]) -> None:
    name = removed["model"]
    if removed["alias_of"]:
        click.echo(f"{name} is no alias of {removed['alias_of']} any more.")
        return
    freed = "the file that the link led to stays"
    if not removed["links"]:
        freed = f"{megabytes(removed['size'])} are free"
        if count := removed["running"]:
            freed += f" after {count} {'request that runs' if count == 1 else 'requests that run'}"
    click.echo(f"{name} is deleted: {freed}.")
    for alias in removed["aliases"]:
        click.echo(f"{alias} is an alias of it and leads nowhere now.", err=True)
