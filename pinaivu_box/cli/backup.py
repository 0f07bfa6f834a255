"""`pinaivu backup` and `pinaivu restore`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click
import msgspec

from pinaivu_box.cli.call import Call
from pinaivu_box.cli.options import standard_options
from pinaivu_box.cli.render import print_json
from pinaivu_box.errors import CliError
from pinaivu_box.text import megabytes

_VARIABLE = "PINAIVU_BACKUP_PASSPHRASE"
_file_argument = click.argument("file", type=click.Path(path_type=Path))


@click.command()
@_file_argument
@standard_options()
@click.option("--encrypt", is_flag=True, help="Encrypt the backup with a passphrase.")
@click.option("--force", is_flag=True, help="Overwrite FILE.")
def backup(call: Call, file: Path, encrypt: bool, force: bool) -> None:
    """Back up the database, the identity and HOME/config.toml into FILE, and verify it.

    The server may be running.  Model files are not included.  FILE contains the private key of the
    box: keep it safe, or encrypt it.

    The passphrase is read from PINAIVU_BACKUP_PASSPHRASE; if that is not set, it is asked for on a
    terminal, or read from standard input (one line).
    """
    from pinaivu_box.backup.make import make

    manifest = make(call.home, file, _passphrase(confirm=True) if encrypt else None, force=force)
    size = file.stat().st_size
    if call.as_json:
        facts = {"file": str(file), "size": size, "encrypted": encrypt}
        print_json({**facts, **msgspec.to_builtins(manifest)})
        return
    names = ", ".join(part.name for part in manifest.parts)
    click.echo(f"{file}: {megabytes(size, 1)}, {'encrypted' if encrypt else 'not encrypted'}")
    click.echo(f"  {names} of {manifest.node_id}")
    click.echo("  Verified.  Model files are not included.")


@click.command()
@_file_argument
@standard_options()
@click.option("--force", is_flag=True, help="If HOME has a box, move its files aside.")
def restore(call: Call, file: Path, force: bool) -> None:
    """Restore the backup in FILE into HOME: all of it, or nothing if it is damaged.

    No server may be running on HOME.  Model files are not included: copy them yourself.
    """
    from pinaivu_box.backup import restore

    home = call.home
    restored = restore.restore(file, home, lambda: _passphrase(confirm=False), force=force)
    manifest = restored.manifest
    if call.as_json:
        aside = str(restored.aside) if restored.aside else None
        print_json({"home": str(home), "aside": aside, **msgspec.to_builtins(manifest)})
        return
    click.echo(f"{home} is restored: {manifest.node_id} as of {manifest.created}.")
    if restored.aside:
        click.echo(f"The previous files are in {restored.aside}.")


def _passphrase(*, confirm: bool) -> str:
    """Raises CliError."""
    passphrase = os.environ.get(_VARIABLE)
    if passphrase is None and sys.stdin.isatty():
        passphrase = click.prompt(
            "Passphrase", hide_input=True, confirmation_prompt=confirm, err=True, type=str
        )
    elif passphrase is None:
        passphrase = sys.stdin.readline().rstrip("\r\n")
    if not passphrase:
        raise CliError(
            f"The passphrase is empty: type one, set {_VARIABLE}, or write it to standard input."
        )
    return str(passphrase)
