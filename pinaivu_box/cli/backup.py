"""`pinaivu backup` and `pinaivu restore`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click
import msgspec

from pinaivu_box.cli.home import home_option, json_option, print_json
from pinaivu_box.errors import CliError

_VARIABLE = "PINAIVU_BACKUP_PASSPHRASE"
_file_argument = click.argument("file", type=click.Path(path_type=Path))


@click.command()
@_file_argument
@home_option
@json_option
@click.option("--encrypt", is_flag=True, help="Ask for a passphrase and encrypt with it.")
@click.option("--force", is_flag=True, help="Overwrite FILE.")
def backup(file: Path, home: Path, as_json: bool, encrypt: bool, force: bool) -> None:
    """Write the database, the identity and HOME/config.toml into FILE, and check it.

    The server may be running.  Model files are not in it.  Whoever has FILE has the identity: keep
    it safe, or encrypt it.  The passphrase is that of PINAIVU_BACKUP_PASSPHRASE, is asked for, or
    is, without a terminal, the first line of standard input.
    """
    from pinaivu_box.backup.make import make

    manifest = make(home, file, _passphrase(confirm=True) if encrypt else None, force=force)
    size = file.stat().st_size
    if as_json:
        facts = {"file": str(file), "size": size, "encrypted": encrypt}
        print_json({**facts, **msgspec.to_builtins(manifest)})
        return
    names = ", ".join(part.name for part in manifest.parts)
    click.echo(f"{file}: {size / 1e6:,.1f} MB, {'encrypted' if encrypt else 'not encrypted'}")
    click.echo(f"  {names} of {manifest.node_id}")
    click.echo("  Checked.  Model files are not in it.")


@click.command()
@_file_argument
@home_option
@json_option
@click.option("--force", is_flag=True, help="Move the files of a box that is there aside.")
def restore(file: Path, home: Path, as_json: bool, force: bool) -> None:
    """Check the backup in FILE, then make it the box in HOME; all of it or nothing.

    No server may be running on HOME.  Copy the model files yourself.
    """
    from pinaivu_box.backup.restore import restore as put_back

    done = put_back(file, home, lambda: _passphrase(confirm=False), force=force)
    if as_json:
        aside = str(done.aside) if done.aside else None
        print_json({"home": str(home), "aside": aside, **msgspec.to_builtins(done.manifest)})
        return
    click.echo(f"{home} is {done.manifest.node_id} as of {done.manifest.created}.")
    if done.aside:
        click.echo(f"What was there before is in {done.aside}.")


def _passphrase(*, confirm: bool) -> str:
    found = os.environ.get(_VARIABLE)
    if found is None and sys.stdin.isatty():
        found = click.prompt(
            "Passphrase", hide_input=True, confirmation_prompt=confirm, err=True, type=str
        )
    elif found is None:
        found = sys.stdin.readline().rstrip("\r\n")
    if not found:
        raise CliError(
            f"The passphrase is empty: type one, set {_VARIABLE}, or write it to standard input."
        )
    return str(found)
