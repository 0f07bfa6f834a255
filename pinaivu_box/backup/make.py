"""Makes a backup: a snapshot in the home, an archive next to the target, then one rename."""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from pinaivu_box import __version__, identity
from pinaivu_box.backup import archive
from pinaivu_box.backup.archive import DATABASE, IDENTITY, NAMES, Manifest, OpenFile
from pinaivu_box.backup.sealed import BadBackup, Sealer, Unsealer
from pinaivu_box.errors import CliError
from pinaivu_box.store import integrity
from pinaivu_box.text import utc_text

WORKSPACE = "backup.new"


def make(home: Path, file: Path, passphrase: str | None, *, force: bool) -> Manifest:
    """Write the backup and check it by reading it again.  Raises CliError, DatabaseUnusable.

    The snapshot is made in the home, which holds the same data unencrypted: nothing readable is
    written next to an encrypted backup.
    """
    _refuse(home, file, force)
    try:
        with _workspace(home) as folder:
            manifest, files = _collect(home, folder / DATABASE)
            with contextlib.closing(files[DATABASE]), _written_beside(file) as out:
                _write(out, manifest, files, passphrase)
                _read_again(out, manifest, passphrase)
    except sqlite3.Error as error:
        raise CliError(f"The database of {home} cannot be copied: {error}.") from error
    except BadBackup as error:
        raise CliError(f"{file} was not written correctly ({error}): try another disk.") from error
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise CliError(f"The backup cannot be written: {error.strerror}{where}.") from error
    return manifest


def _refuse(home: Path, file: Path, force: bool) -> None:
    if not (home / DATABASE).exists():
        raise CliError(f"There is no box in {home}: choose another --home.")
    if not (home / IDENTITY).exists():
        raise CliError(
            f"There is no {IDENTITY} in {home}, without which a backup is useless: copy the old "
            "one back, or let 'pinaivu serve' create one."
        )
    if file.exists() and not file.is_file():
        raise CliError(f"{file} is no ordinary file: name another to write.")
    if file.resolve() in [(home / name).resolve() for name in NAMES]:
        raise CliError(f"{file} is what is to be backed up: name another file.")
    if file.exists() and not force:
        raise CliError(f"{file} exists already: choose another name, or pass --force.")


@contextlib.contextmanager
def _workspace(home: Path) -> Iterator[Path]:
    """A folder in the home, for one backup at a time; what an interrupted one left is removed."""
    folder = home / WORKSPACE
    folder.mkdir(mode=0o700, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for left in folder.iterdir():
            left.unlink()
        yield folder
        shutil.rmtree(folder)
    except BlockingIOError as error:
        raise CliError(f"Another backup of {home} is running: wait for it.") from error
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    finally:
        os.close(handle)


def _collect(home: Path, copy: Path) -> tuple[Manifest, dict[str, OpenFile]]:
    """The manifest, and an open file for each of its parts."""
    integrity.copy(home / DATABASE, copy)
    integrity.make_backup_of(copy)
    schema = integrity.check(copy, f"The database of {home}", alone=True, home=home)
    files: dict[str, OpenFile] = {
        name: io.BytesIO((home / name).read_bytes())
        for name in NAMES
        if name != DATABASE and (home / name).exists()
    }
    files[DATABASE] = copy.open("rb")
    manifest = Manifest(
        version=__version__,
        schema=schema,
        node_id=identity.load_or_create(home / IDENTITY).node_id,
        created=utc_text(time.time()),
        parts=[archive.part_of(name, file) for name, file in files.items()],
    )
    return manifest, files


@contextlib.contextmanager
def _written_beside(file: Path) -> Iterator[BinaryIO]:
    """A file (0600) next to `file`, renamed to it when it is complete and on disk."""
    handle, name = tempfile.mkstemp(".part", f"{file.name}.", file.parent)
    try:
        with os.fdopen(handle, "w+b") as out:
            yield out
            out.flush()
            os.fsync(out.fileno())
        Path(name).replace(file)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    sync(file.parent)


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write(
    out: BinaryIO, manifest: Manifest, files: dict[str, OpenFile], passphrase: str | None
) -> None:
    if passphrase is None:
        archive.write(out, manifest, files)
        return
    sealer = Sealer(out, passphrase)
    archive.write(sealer, manifest, files)
    sealer.finish()


def _read_again(out: BinaryIO, manifest: Manifest, passphrase: str | None) -> None:
    """Check that the file has the snapshot, which was checked before.  Raises BadBackup."""
    out.flush()
    out.seek(0)
    source = out if passphrase is None else Unsealer(out, passphrase)
    if archive.read_manifest(source) != manifest:
        raise BadBackup("it reads differently than it was written")
    archive.read_parts(source, manifest, _nowhere)


def _nowhere(_part: str) -> BinaryIO:
    return Path(os.devnull).open("wb")
