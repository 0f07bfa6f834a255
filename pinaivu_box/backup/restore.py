"""Puts a backup back: everything is checked in a folder of the home, then one rename decides.

    restore.new/       the backup's files while they are written and checked; of no meaning
    restore.ready/     the same folder, renamed: from here on the home is the new one
        pinaivu.db, identity.key, ...   not yet in their place
        old/                            what they replace

Whatever ends a restore after that rename, `complete` goes on where it stopped, and every command
calls it before it looks at a home.  Only a command that had looked already is not kept off.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, BinaryIO

from msgspec import Struct

from pinaivu_box import identity
from pinaivu_box.backup import archive
from pinaivu_box.backup.archive import CONFIG, DATABASE, IDENTITY, Manifest
from pinaivu_box.backup.make import sync_folder
from pinaivu_box.backup.sealed import MAGIC, BadBackup, ByteSource, Unsealer
from pinaivu_box.errors import CliError, DatabaseUnusable, SchemaUnsupported
from pinaivu_box.home import lock, prepare_home
from pinaivu_box.store import integrity
from pinaivu_box.store.schema import CURRENT

STAGING, READY = "restore.new", "restore.ready"
_OLD = "old"
# What goes with a file that is replaced: a WAL must never meet another database.
_COMPANIONS = {DATABASE: (f"{DATABASE}-wal", f"{DATABASE}-shm")}
_SPARE_BYTES = 16 * 1024 * 1024


class Restored(Struct, frozen=True):
    """`aside` is the folder that holds what was replaced, None if there was nothing."""

    manifest: Manifest
    aside: Path | None


def restore(file: Path, home: Path, passphrase: Callable[[], str], *, force: bool) -> Restored:
    """Check the backup whole, then make the home what it holds.  Raises CliError.

    `passphrase` is asked only if the file is encrypted.
    """
    try:
        with file.open("rb") as opened:
            source = _source(opened, passphrase)
            manifest = archive.read_manifest(source)
            _refuse_unreadable(manifest)
            with contextlib.closing(lock(prepare_home(home))):
                _refuse_occupied(home, force)
                _stage(source, manifest, home)
                return Restored(manifest, _put_in_place(home))
    except BadBackup as error:
        raise CliError(f"{file} cannot be restored: {error}.") from error
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise CliError(f"{file} cannot be restored: {error.strerror}{where}.") from error


def complete(home: Path) -> Path | None:
    """Finish a restore that was cut off after it was decided; where the old files are.

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
        raise CliError(f"A restore into {home} is under way: try again when it is done.") from None


def _source(file: BinaryIO, passphrase: Callable[[], str]) -> ByteSource:
    beginning = file.read(len(MAGIC))
    file.seek(0)
    return Unsealer(file, passphrase()) if beginning == MAGIC else file


def _refuse_unreadable(manifest: Manifest) -> None:
    try:
        CURRENT.check_version(manifest.schema, "its database")
    except SchemaUnsupported as error:
        raise BadBackup(error.message.removesuffix(".")) from error


def _refuse_occupied(home: Path, force: bool) -> None:
    there = [name for name in (DATABASE, IDENTITY, CONFIG) if (home / name).exists()]
    if there and not force:
        raise CliError(
            f"There is a box in {home} already ({', '.join(there)}): choose another --home, or "
            "pass --force to move its files aside."
        )


def _stage(source: ByteSource, manifest: Manifest, home: Path) -> None:
    """Write the parts into the staging folder and check them there."""
    folder = home / STAGING
    shutil.rmtree(folder, ignore_errors=True)
    need = sum(part.size for part in manifest.parts) + _SPARE_BYTES
    free = shutil.disk_usage(home).free
    if need > free:
        raise BadBackup(f"{home} would need {need / 1e6:,.0f} MB and has {free / 1e6:,.0f} MB")
    folder.mkdir(mode=0o700)
    try:
        archive.read_parts(source, manifest, lambda name: _new_file(folder / name))
        _check_identity(folder / IDENTITY, manifest)
        schema = integrity.check(folder / DATABASE, "its database", alone=True)
        if schema != manifest.schema:
            raise BadBackup(f"its database has schema {schema}, not {manifest.schema}")
        for part in manifest.parts:
            _sync_file(folder / part.name)
        sync_folder(folder)
    except DatabaseUnusable as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise BadBackup(error.message.removesuffix(".")) from error
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _new_file(path: Path) -> BinaryIO:
    path.touch(0o600, exist_ok=False)
    return path.open("wb")


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _check_identity(path: Path, manifest: Manifest) -> None:
    try:
        found = identity.load_or_create(path).node_id
    except CliError:
        raise BadBackup("its identity.key is damaged") from None
    if found != manifest.node_id:
        raise BadBackup("its identity.key is not that of the node in its manifest")


def _put_in_place(home: Path) -> Path | None:
    (home / STAGING).rename(home / READY)
    sync_folder(home)
    return _finish(home)


def _finish(home: Path) -> Path | None:
    """Each step may be the last, and may have been done before."""
    ready = home / READY
    if not ready.exists():
        return None
    old = ready / _OLD
    old.mkdir(mode=0o700, exist_ok=True)
    for name in (DATABASE, IDENTITY, CONFIG):
        if not (ready / name).exists():
            continue  # in place already, or not in this backup
        # The new one is not in place yet: whatever has its name is old.
        for replaced in (*_COMPANIONS.get(name, ()), name):
            if (home / replaced).exists():
                (home / replaced).rename(old / replaced)
        (ready / name).rename(home / name)
    sync_folder(home)
    aside = None
    if any(old.iterdir()):
        aside = _unused(home / time.strftime("before-restore-%Y%m%dT%H%M%SZ", time.gmtime()))
        old.rename(aside)
    shutil.rmtree(ready)
    sync_folder(home)
    return aside


def _unused(path: Path) -> Path:
    number, candidate = 1, path
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.name}-{number}")
    return candidate
