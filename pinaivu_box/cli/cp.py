"""`pinaivu cp`: other names for models."""

from __future__ import annotations

from typing import Any

import click

from pinaivu_box.cli import suggestions
from pinaivu_box.cli.call import Call
from pinaivu_box.cli.client import request_or_open
from pinaivu_box.cli.options import standard_options


@click.command()
@standard_options(config=True)
@click.argument("model", shell_complete=suggestions.models)
@click.argument("alias")
def cp(call: Call, model: str, alias: str) -> None:
    """Make ALIAS another name of MODEL; nothing is copied.

    Requests may ask for either; answers and receipts name the model.  A key that is limited to
    certain models may use an alias if it may use its model.  'pinaivu rm ALIAS' removes it.
    """
    body = {"source": model, "destination": alias}
    made = request_or_open(call, "/v1/admin/models/copy", method="POST", body=body, peering=False)
    made.pop("request_id", None)
    call.print(made, _print)


def _print(made: dict[str, Any]) -> None:
    click.echo(f"{made['alias']} is an alias of {made['model']}.")
