"""`pinaivu verify-release`: are these files what was released?"""

from __future__ import annotations

import sys
from pathlib import Path

import click

from pinaivu_box.errors import CliError, ReleaseNotVerified, quoted

_MAX_KEY_BYTES = 4096


@click.command("verify-release")
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--sums",
    "sums_file",
    type=click.Path(path_type=Path),
    help="The release's SHA256SUMS; its signature is beside it, with .sig behind its name.  "
    "[default: beside each FILE]",
)
@click.option(
    "--key",
    "key_file",
    type=click.Path(path_type=Path),
    help="The release key (PEM).  [default: the one that comes with this program]",
)
def verify_release(files: tuple[Path, ...], sums_file: Path | None, key_file: Path | None) -> None:
    """Check files of a release: signature, then digest.

    For each FILE one line says whether it is what the owner of the release key has released, under
    its name.  The exit status is 1 if one is not.
    """
    key = _read(key_file, _MAX_KEY_BYTES) if key_file else _key_of_this_program()
    failed = False
    for path in files:
        try:
            _verify(path, sums_file, key)
            click.echo(f"{path}: signature and digest are right.")
        except (CliError, ReleaseNotVerified) as error:
            click.echo(f"{path}: {error.message}")
            failed = True
    if failed:
        sys.exit(1)


def _verify(path: Path, sums_file: Path | None, key: bytes) -> None:
    from pinaivu_box.release import sums

    sums_file = sums_file or path.with_name(sums.SUMS)
    signature_file = sums_file.with_name(f"{sums_file.name}.sig")
    listed = _read(sums_file, sums.MAX_SUMS_BYTES)
    digests = sums.verified(listed, _read(signature_file, sums.SIGNATURE_BYTES), key)
    if path in (sums_file, signature_file):
        return  # they are what was verified
    try:
        sums.check(path, path.name, digests)
    except OSError as error:
        raise CliError(f"It cannot be read: {error.strerror}.") from error


def _key_of_this_program() -> bytes:
    from pinaivu_box.release.sums import public_key

    key = public_key()
    if key is None:
        raise CliError(
            "This program comes without a release key, since none has been made yet: name the key "
            "of the release with --key PUBLIC.pem."
        )
    return key


def _read(path: Path, most: int) -> bytes:
    """What is in a small file; one byte more than `most` of a longer one, so that it is refused."""
    try:
        with path.open("rb") as file:
            return file.read(most + 1)
    except OSError as error:
        raise CliError(f"{quoted(str(path))} cannot be read: {error.strerror}.") from error
