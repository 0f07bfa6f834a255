"""Restores a backup: everything is checked in a folder of the home, then one rename commits it.

    restore.new/       the files of the backup while they are written and checked; has no effect
    restore.ready/     the same folder, renamed: the restore is committed
        pinaivu.db, identity.key, ...   not moved into the home yet
        old/                            the files that they replace

If a restore is interrupted after that rename, `complete` continues it.  Every command calls it
before it reads a home; a command that runs already is not stopped.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, BinaryIO

from msgspec import Struct

from pinaivu_box import identity
from pinaivu_box.backup import archive
from pinaivu_box.backup.archive import DATABASE, IDENTITY, NAMES, Manifest, Source
from pinaivu_box.backup.make import sync
from pinaivu_box.backup.sealed import MAGIC, BadBackup, Unsealer
from pinaivu_box.errors import CliError, DatabaseUnusable
from pinaivu_box.home import lock, prepare_home
from pinaivu_box.store import integrity
from pinaivu_box.store.schema import CURRENT
from pinaivu_box.text import megabytes

STAGING, READY = "restore.new", "restore.ready"
_MOVED = (DATABASE, *(name for name in NAMES if name != DATABASE))
_OLD = "old"
# Files that are replaced together: a WAL must never be used with another database.
_COMPANIONS = {DATABASE: (f"{DATABASE}-wal", f"{DATABASE}-shm")}
_SPARE_BYTES = 16 * 1024 * 1024


class Restored(Struct, frozen=True):
    """`aside` is the folder with the files that were replaced, None if there were none."""

    manifest: Manifest
    aside: Path | None


def restore(file: Path, home: Path, passphrase: Callable[[], str], *, force: bool) -> Restored:
    """Check the whole backup, then replace the home by it.  Raises CliError.

    `passphrase` is called only if the file is encrypted.
    """
    try:
        with file.open("rb") as opened:
            source = _source(opened, passphrase)
            manifest = archive.read_manifest(source)
            CURRENT.check_version(manifest.schema, "its database", program=manifest.version)
            with contextlib.closing(lock(prepare_home(home))):
                _refuse_occupied(home, force)
                _stage(source, manifest, home)
                (home / STAGING).rename(home / READY)
                sync(home)
                return Restored(manifest, _finish(home))
    except (BadBackup, DatabaseUnusable) as error:
        raise CliError(f"{file} cannot be restored: {str(error).removesuffix('.')}.") from error
    except OSError as error:
        where = (
            f" ({error.filename})" if error.filename and str(error.filename) != str(file) else ""
        )
        raise CliError(f"{file} cannot be restored: {error.strerror}{where}.") from error


def complete(home: Path) -> Path | None:
    """Finish a restore that was interrupted after its commit; returns where the old files are.

    Raises CliError.
    """
    try:
        with contextlib.closing(_lock(home)):
            return _finish(home)
    except OSError as error:
        raise CliError(f"The restore into {home} cannot be finished: {error.strerror}.") from error


def _lock(home: Path) -> IO[str]:
    try:
        return lock(home)
    except CliError:
        raise CliError(f"A restore into {home} is running: try again when it is done.") from None


def _source(file: BinaryIO, passphrase: Callable[[], str]) -> Source:
    beginning = file.read(len(MAGIC))
    file.seek(0)
    return Unsealer(file, passphrase()) if beginning == MAGIC else file


def _refuse_occupied(home: Path, force: bool) -> None:
    existing = [name for name in _MOVED if (home / name).exists()]
    if existing and not force:
        raise CliError(
            f"There is already a box in {home} ({', '.join(existing)}): choose another --home, or "
            "use --force to move its files aside."
        )


def _stage(source: Source, manifest: Manifest, home: Path) -> None:
    """Write the parts into the staging folder, and check them there."""
    folder = home / STAGING
    shutil.rmtree(folder, ignore_errors=True)
    need = sum(part.size for part in manifest.parts) + _SPARE_BYTES
    free = shutil.disk_usage(home).free
    if need > free:
        raise BadBackup(f"{home} needs {megabytes(need)} and has {megabytes(free)}")
    folder.mkdir(mode=0o700)
    try:
        archive.read_parts(source, manifest, lambda name: _new_file(folder / name))
        _check_identity(folder / IDENTITY, manifest)
        schema = integrity.check(folder / DATABASE, "its database", alone=True)
        if schema != manifest.schema:
            raise BadBackup(f"its database has schema {schema}, not {manifest.schema}")
        for part in manifest.parts:
            sync(folder / part.name)
        sync(folder)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _new_file(path: Path) -> BinaryIO:
    path.touch(0o600, exist_ok=False)
    return path.open("wb")


def _check_identity(path: Path, manifest: Manifest) -> None:
    try:
        node_id = identity.load_or_create(path).node_id
    except CliError:
        raise BadBackup("its identity.key is damaged") from None
    if node_id != manifest.node_id:
        raise BadBackup("its identity.key does not belong to the node in its manifest")


def _finish(home: Path) -> Path | None:
    """Move the files into place; each step may be interrupted, and may have been done before."""
    ready = home / READY
    if not ready.exists():
        return None
    old = ready / _OLD
    old.mkdir(mode=0o700, exist_ok=True)
    for name in _MOVED:
        if not (ready / name).exists():
            continue  # in place already, or not in this backup
        # The new file is not in place yet, so the one with its name is the old one.
        for replaced in (*_COMPANIONS.get(name, ()), name):
            if (home / replaced).exists():
                (home / replaced).rename(old / replaced)
        (ready / name).rename(home / name)
    sync(home)
    aside = None
    if any(old.iterdir()):
        aside = _unused(home / time.strftime("before-restore-%Y%m%dT%H%M%SZ", time.gmtime()))
        old.rename(aside)
    shutil.rmtree(ready)
    sync(home)
    return aside


def _unused(path: Path) -> Path:
    number, candidate = 1, path
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.name}-{number}")
    return candidate
