"""`pinaivu id`: who this box is."""

from __future__ import annotations

from pathlib import Path

import click

from pinaivu_box.cli.home import home_option, json_option, own_node, print_json
from pinaivu_box.errors import CliError
from pinaivu_box.identity import NODE_PREFIX


@click.command("id")
@home_option
@json_option
def show(home: Path, as_json: bool) -> None:
    """Print the node key of this box, 64 hex digits: what its receipts are verified with.

    The box is called node_ and these digits.  The key is public.
    """
    node_id = own_node(home)
    if not node_id:
        raise CliError(f"The box on {home} has no key yet: the first 'pinaivu serve' makes one.")
    key = node_id.removeprefix(NODE_PREFIX)
    if as_json:
        print_json({"node_id": node_id, "node_key": key})
    else:
        click.echo(key)
