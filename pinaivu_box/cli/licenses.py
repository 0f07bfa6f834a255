"""`pinaivu licenses`: what is in this program, and under which licences."""

from __future__ import annotations

from operator import attrgetter

import click

from pinaivu_box.cli.call import Call
from pinaivu_box.cli.options import standard_options
from pinaivu_box.cli.render import UNKNOWN, Column

_COLUMNS = (
    Column("NAME", attrgetter("name")),
    Column("VERSION", attrgetter("version"), cut="end", drop=1),
    Column("KIND", attrgetter("kind"), drop=2),
    Column("LICENSE", lambda one: one.license or UNKNOWN, cut="end"),
)
_RULE = "=" * 80


@click.command()
@standard_options(home=False, wide=True)
@click.option("--full", is_flag=True, help="Print the texts of all licences.")
def licenses(call: Call, full: bool) -> None:
    """Show the licences of all that is in this program.

    The table names them; --full has the texts, with the notices that come with them.
    """
    from msgspec.structs import replace

    from pinaivu_box.release.licenses import components

    found = components()
    if call.as_json and not full:
        found = [replace(one, texts=()) for one in found]
    if full and not call.as_json:
        for one in found:
            title = " ".join(filter(None, [one.name, one.version]))
            click.echo(f"{_RULE}\n{title}: {one.license or UNKNOWN}\n{_RULE}\n")
            for part in one.parts:
                click.echo(f"with {part.name} {part.version}: {part.license or UNKNOWN}")
            for text in one.texts:
                click.echo(f"--- {text.name}\n\n{text.text.rstrip()}\n")
        return
    call.print_list(found, _COLUMNS)
